from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.ops import affine_qparams, fake_quantize_per_tensor_affine
from fxquant.passes.joint.tag_recompute import TagRecompute
from tests.passes.graphs import apply, untouched

SAVE, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE


def step(x: Tensor, low: Tensor, high: Tensor, point: Tensor) -> Tensor:
    scale, zero = affine_qparams(low, high, 0, 255, False)
    return fake_quantize_per_tensor_affine(x, scale, zero, 0, 255) + fake_quantize_per_tensor_affine(
        x, low, point, 0, 9
    )


def graph() -> torch.fx.GraphModule:
    args = (torch.ones(3), torch.ones(1), torch.ones(1), torch.ones(1, dtype=torch.int32))
    return make_fx(step, tracing_mode="fake")(*args)


def tags(gm: torch.fx.GraphModule) -> dict[str, CheckpointPolicy]:
    return {node.name: node.meta["recompute"] for node in gm.graph.nodes if "recompute" in node.meta}


def test_results_are_recomputed_and_scales_saved() -> None:
    gm = graph()
    result = apply(TagRecompute(), gm)
    assert result.rewrites == 5
    assert tags(gm) == {
        "affine_qparams": SAVE,  # the partitioner looks at the op with several results
        "getitem": SAVE,
        "getitem_1": SAVE,
        "fake_quantize_per_tensor_affine": AGAIN,
        "fake_quantize_per_tensor_affine_1": AGAIN,
    }


def test_constant_zero_points_are_made_again() -> None:
    def symmetric(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize_per_tensor_affine(x, scale, torch.full((1,), 0, dtype=torch.int32), -127, 127)

    gm = make_fx(symmetric, tracing_mode="fake")(torch.ones(3), torch.ones(1))
    apply(TagRecompute(), gm)
    assert tags(gm) == {"full": AGAIN, "fake_quantize_per_tensor_affine": AGAIN}


def test_users_own_tags_stay_but_for_scales() -> None:
    gm = graph()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    apply(TagRecompute(), gm)
    found = tags(gm)
    assert found["fake_quantize_per_tensor_affine"] == found["add"] == CheckpointPolicy.PREFER_RECOMPUTE
    assert found["getitem"] == found["getitem_1"] == SAVE


def test_untouched() -> None:
    assert untouched(TagRecompute(), make_fx(lambda x: x + 1)(torch.ones(3))).declines == []
