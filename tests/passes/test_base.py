"""What all passes share: the contract of `run`, keys of caches, invariants."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from fxquant.errors import InvariantViolated
from fxquant.graph.bodies import all_graphs
from fxquant.passes.base import Pass, PassResult, run_all
from fxquant.passes.captured.quantize_bias import QuantizeBias
from fxquant.passes.pipelines import joint_passes, post_grad_passes, training_passes
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.stages import CAPTURED, POST_GRAD
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT8, W4A8
from fxquant.support.digest import source_digest
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import QUANTIZE, captured
from tests.processes import under_another_hash_seed


@dataclass(frozen=True, kw_only=True)
class Edit(Pass):
    """Does to each fake-quant node what the test says."""

    stages: ClassVar = (CAPTURED, POST_GRAD)

    field: str
    value: Any

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        done = 0
        for module in all_graphs(gm):
            for node in module.graph.nodes:
                if "site" in node.meta:
                    self.edit(node)
                    self.decline(result, node, "because")
                    done += 1
        return done

    def edit(self, node: fx.Node) -> None:
        if self.field == "site":
            node.meta["site"] = dataclasses.replace(node.meta["site"])
        target = {"value": node, "scale": node.args[1], "point": node.args[2]}.get(self.field)
        if self.field == "nested scale":
            node.update_arg(1, node.args[0])
            node.args[0].target = node.target  # type: ignore[union-attr]
        elif isinstance(target, fx.Node):
            target.meta["val"] = target.meta["val"].to(self.value) if self.value else target.meta["val"][..., :0]


def graph() -> fx.GraphModule:
    return captured(nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3), passes=QUANTIZE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("value", torch.float16, r"after Edit: fake_quantize\S* must keep shape and floating dtype: got \(.*float16"),
        ("value", None, r"after Edit: fake_quantize\S* must keep shape and floating dtype"),
        ("scale", torch.float64, r"after Edit: the scale of fake_quantize\S* must be float32: got torch.float64"),
        (
            "point",
            torch.float32,
            r"after Edit: the zero point of fake_quantize\S* must be an integer: got torch.float32",
        ),
    ],
)
def test_a_broken_invariant_names_the_pass(field: str, value: Any, message: str) -> None:
    gm = graph()
    with pytest.raises(InvariantViolated, match=message):
        Edit(field=field, value=value).run(gm)
    with pytest.raises(InvariantViolated, match="before LowerFakeQuantize"):
        LowerFakeQuantize().run(gm, POST_GRAD)


def test_a_quantized_scale_is_refused() -> None:
    gm = graph()
    first, *_ = [node for node in gm.graph.nodes if "site" in node.meta]
    first.update_arg(1, [node for node in gm.graph.nodes if "site" in node.meta][-1])
    with pytest.raises(InvariantViolated, match="must not be fake-quantized itself"):
        LowerFakeQuantize().run(gm, POST_GRAD)


def test_result_adds_up() -> None:
    edit = Edit(field="site", value=None)
    gm = graph()
    one = edit.run(gm)
    assert one.modified and one.rewrites == 2 and one.seconds > 0
    assert str(one.declines[0]).startswith("Edit declined fake_quantize") and str(one.declines[0]).endswith(": because")
    total = run_all([edit, edit], gm)
    assert total.rewrites == 4 and len(total.declines) == 4 and total.seconds > 0


def test_uuid_follows_name_options_and_sources() -> None:
    lines = [
        p.uuid()
        for r in (INT8, W4A8, INT8.with_range(CurrentTensor()))
        for p in training_passes(r, ONNXRUNTIME, stateless=True)
    ]
    inserts = {line for line in lines if line.startswith("InsertFakeQuantize")}
    assert len(inserts) == 3
    assert all(line.endswith(source_digest()) for line in lines)
    after = (*joint_passes(), *post_grad_passes(), QuantizeBias(profile=ONNXRUNTIME))
    assert len({p.uuid() for p in after}) == len(after)
    assert LowerFakeQuantize(decompositions=lambda: {}).uuid() == LowerFakeQuantize().uuid()


def test_uuid_is_the_same_in_every_process() -> None:
    code = (
        "from fxquant.passes.captured.quantize_bias import QuantizeBias; from fxquant.profiles import ONNXRUNTIME;"
        "print(QuantizeBias(profile=ONNXRUNTIME).uuid())"
    )
    assert under_another_hash_seed(code).strip() == str(QuantizeBias(profile=ONNXRUNTIME).uuid())
