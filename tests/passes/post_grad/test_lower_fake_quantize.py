from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.nodes import call_nodes
from fxquant.ops import (
    dequantize_per_tensor,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    quantize_per_tensor,
)
from fxquant.ops.fake_quantize import PER_CHANNEL_BACKWARD, PER_TENSOR_BACKWARD
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.stages import POST_GRAD, enter
from tests.ops.oracle import assert_same_bits, hard_values
from tests.passes.graphs import apply, captured, show, untouched


def post_grad(model: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """A graph as Inductor would give it."""
    return enter(captured(model, *args), POST_GRAD)


SCALE, POINT = torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32)


def test_snapshot() -> None:
    gm = post_grad(
        lambda x, s, z: fake_quantize_per_tensor_affine(x, s, z, 0, 15, rounding="divide"),
        torch.ones(3, 2),
        SCALE,
        POINT,
    )
    assert apply(LowerFakeQuantize(), gm).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
view = view(arg0_1, [])
view_1 = view(arg1_1, [])
div = div(arg2_1, view)
round_1 = round(div)
_to_copy = _to_copy(view_1)
add = add(round_1, _to_copy)
ge = ge(add, 0)
scalar_tensor = scalar_tensor(0)
where = where(ge, add, scalar_tensor)
clamp = clamp(where, None, 15)
_to_copy_1 = _to_copy(view_1)
sub = sub(clamp, _to_copy_1)
mul = mul(sub, view)
return [mul]
""",
    )


def test_operands_by_keyword_are_operands() -> None:
    def quantized(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return fake_quantize_per_tensor_affine(x, s, z, 0, 15, rounding="divide")

    x = hard_values(0.3, 0, 15)
    gm = post_grad(quantized, x, SCALE, POINT)
    (node,) = call_nodes(gm.graph)
    node.args, node.kwargs = node.args[:1], {"scale": node.args[1], "zero_point": node.args[2], **_rest(node)}
    gm.recompile()
    assert apply(LowerFakeQuantize(), gm).rewrites == 1
    assert_same_bits(gm(SCALE, POINT, x)[0], quantized(x, SCALE, POINT))


def _rest(node: fx.Node) -> dict[str, Any]:
    return {"quant_min": node.args[3], "quant_max": node.args[4], **node.kwargs}


def test_a_mask_is_computed_again_and_tags_are_kept() -> None:
    """The mask needs no gradient, so a partitioner could keep it from forward; what follows it needs one."""
    gm = post_grad(
        lambda g, x, s, z: PER_TENSOR_BACKWARD(g, fake_quantize_per_tensor_affine(x, s, z, 0, 15), s, z, 0, 15),
        *(torch.ones(3), torch.ones(3), SCALE, POINT),
    )
    forward = next(node for node in gm.graph.nodes if "fake_quantize" in node.name)
    forward.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    forward.meta["ac_graph_id"] = 7
    apply(LowerFakeQuantize(), gm)
    policies = {node.name: node.meta.get("recompute") for node in gm.graph.nodes if node.op == "call_function"}
    assert policies["div" if "div" in policies else "reciprocal"] is CheckpointPolicy.PREFER_RECOMPUTE
    assert {n.meta["ac_graph_id"] for n in gm.graph.nodes if "ac_graph_id" in n.meta} == {7}
    (mask,) = (name for name in policies if "and" in name)
    assert policies[mask] is CheckpointPolicy.MUST_RECOMPUTE
    (product,) = (n.name for n in next(iter(reversed(gm.graph.nodes))).all_input_nodes)
    assert policies[product] is None


def test_every_op_keeps_its_bits() -> None:
    scales, points = torch.tensor([0.3, 1.0]), torch.tensor([0, 3], dtype=torch.int32)

    def model(x: Tensor, s: Tensor, z: Tensor, scales: Tensor, points: Tensor) -> tuple[Tensor, ...]:
        rows = torch.stack([x, x])
        return (
            fake_quantize_per_tensor_affine(x, 0.3, 3, 0, 15),
            fake_quantize_per_tensor_affine(x, s, z, 0, 15, rounding="divide"),
            fake_quantize_per_channel_affine(rows, scales, points, 0, 0, 15),
            PER_TENSOR_BACKWARD(x, x, s, z, 0, 15),
            PER_CHANNEL_BACKWARD(rows, rows, scales, points, 0, 0, 15, rounding="divide"),
        )

    inputs = (hard_values(0.3, 0, 15), SCALE, POINT, scales, points)
    gm = make_fx(model, tracing_mode="fake")(*inputs)
    expected = gm(*inputs)
    assert apply(LowerFakeQuantize(), gm).rewrites == 5
    assert "fxquant" not in gm.code
    for got, want in zip(gm(*inputs), expected, strict=True):
        assert_same_bits(got, want)


def test_origin_is_kept_and_the_table_is_used() -> None:
    gm = post_grad(lambda x, s, z: fake_quantize_per_tensor_affine(x, s, z, 0, 15), torch.ones(3), SCALE, POINT)
    (node,) = [n for n in gm.graph.nodes if "fake_quantize" in n.name]
    node.meta["partitioner_tag"] = "is_backward"
    before = set(gm.graph.nodes)
    table = {torch.ops.aten.round.default: lambda x: torch.trunc(x)}
    apply(LowerFakeQuantize(decompositions=lambda: table), gm)
    made = [n for n in gm.graph.nodes if n not in before]
    assert made and all(n.meta["partitioner_tag"] == "is_backward" and "val" in n.meta for n in made)
    assert "trunc" in gm.code and "round" not in gm.code


def test_in_a_joint_graph_gradients_alone_are_replaced_or_beside_integers_all_but_readers() -> None:
    def model(g: Tensor, x: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        y = fake_quantize_per_tensor_affine(x, s, z, 0, 15)
        codes = quantize_per_tensor(x, s, z, 0, 15, torch.uint8)
        return y, dequantize_per_tensor(codes, s, z), PER_TENSOR_BACKWARD(g, x, s, z, 0, 15)

    def beside(*inputs: Tensor) -> tuple[Tensor, ...]:
        codes = torch.ones(3, 3, dtype=torch.int8)
        return *model(*inputs), torch._int_mm(codes, codes)

    inputs = (torch.ones(3), torch.ones(3), SCALE, POINT)
    left = {}
    for where in ("joint", "beside integers", "post-grad", "anywhere"):
        integers = where == "beside integers"
        gm = post_grad(beside if integers else model, *inputs)
        apply(LowerFakeQuantize(where="joint" if integers else where), gm)
        left[where] = [n.target._schema.name.removeprefix("fxquant::") for n in call_nodes(gm.graph) if is_ours(n)]
    forward = ["fake_quantize_per_tensor_affine", "quantize_per_tensor", "dequantize_per_tensor"]
    backward = "fake_quantize_per_tensor_affine_backward"
    assert left == {
        "joint": forward,
        "beside integers": ["dequantize_per_tensor"],
        "post-grad": [*forward, backward],
        "anywhere": [],
    }


def is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxquant"


def test_untouched() -> None:
    assert untouched(LowerFakeQuantize(), post_grad(lambda x: x + 1, torch.ones(3))).declines == []
