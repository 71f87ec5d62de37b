from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.ops.marks import bind
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.plan.plan import Edge, LocalSite
from fxquant.plan.site_lists import register
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor, Fixed, Range
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import INSERT, apply, captured, show, untouched

BOUND = InsertFakeQuantize(recipe=INT8, profile=ONNXRUNTIME)
U8 = QuantSpec(signed=False, symmetric=False)


def test_stateless_snapshot() -> None:
    gm = captured(nn.Linear(3, 3, bias=False), torch.randn(2, 3))
    assert apply(INSERT, gm).rewrites == 2
    assert_expected_inline(
        show(gm),
        """\
detach_default_1 = detach(arg0_1)
symmetric_qparams_default = symmetric_qparams(detach_default_1, 0, 127)
getitem_4 = getitem(symmetric_qparams_default, 0)
getitem_5 = getitem(symmetric_qparams_default, 1)
fake_quantize_per_channel_affine_default = fake_quantize_per_channel(arg0_1, getitem_4, getitem_5, 0, -127, 127)
detach_default = detach(arg1_1)
full_default = full([1], nan)
resolve_min_max_default = resolve_min_max(detach_default, full_default, full_default)
getitem = getitem(resolve_min_max_default, 0)
getitem_1 = getitem(resolve_min_max_default, 1)
affine_qparams_default = affine_qparams(getitem, getitem_1, 0, 255, False)
getitem_2 = getitem(affine_qparams_default, 0)
getitem_3 = getitem(affine_qparams_default, 1)
fake_quantize_per_tensor_affine_tensor_qparams = fake_quantize_per_tensor(arg1_1, getitem_2, getitem_3, 0, 255)
linear = linear(fake_quantize_per_tensor_affine_tensor_qparams, fake_quantize_per_channel_affine_default)
return [linear]
""",
    )


class Bound(nn.Module):
    """A linear whose input's site is bound by hand, as `BoundForward` does it."""

    def __init__(self, mode: Mode, found: Range | None = None, low: float = -1.0, high: float = 3.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.register_buffer("low", torch.tensor([low]))
        self.register_buffer("high", torch.tensor([high]))
        spec = QuantSpec(signed=False, symmetric=False, range=found) if found else U8
        edge = Edge(path="", kind="linear", ordinal=0, operand="input")
        self.key = register((LocalSite(name="input", role="activation", spec=spec, edges=(edge,)),), "onnxruntime")
        self.mode = int(mode)
        self.stateful = spec.range.stateful

    def forward(self, x: Tensor) -> Tensor:
        bind(self.key, [self.mode], [self.low, self.high] if self.stateful else [])
        return F.linear(x, self.weight)


X = torch.tensor([[-2.0, 0.1, 5.0]])
OBSERVED = ["batch_min_max", "average_min_max", "copy_", "copy_"]
LINEAR = nn.Linear(3, 3)


def run(model: Bound) -> tuple[list[str], Tensor]:
    """Ops on the way, and the result; the state is updated in ``model``."""
    gm = captured(model, X)
    apply(BOUND, gm)
    ops = [line.split(" = ")[1].split("(")[0] for line in show(gm).splitlines() if " = " in line]
    assert "bind" not in ops
    inputs = [t for n in gm.graph.nodes if n.op == "placeholder" for t in [_value(n.meta["source"], model)]]
    return [op for op in ops if "min_max" in op or "copy" in op or "qparams" in op], gm(*inputs)[0]


def _value(source: str, model: Bound) -> Tensor:
    names = {"weight": model.weight, "low": model.low, "high": model.high}
    return next((tensor for name, tensor in names.items() if f"'{name}'" in source), X)


@pytest.mark.parametrize(
    ("mode", "ops", "state", "high"),
    [
        (Mode.OFF, [], (-1, 3), 5.0),
        (Mode.STATIC, ["affine_qparams"], (-1, 3), 3.0),
        (Mode.RESOLVE, ["resolve_min_max", "affine_qparams"], (-1, 3), 3.0),
        (Mode.TRAIN, ["update_min_max", "copy_", "copy_", "affine_qparams"], (-1.01, 3.02), 3.02),
        (Mode.EXTEND, ["extend_min_max", "copy_", "copy_"], (-2, 5), 5.0),
        (Mode.FOLLOW, ["update_min_max", "copy_", "copy_"], (-1.01, 3.02), 5.0),
        (Mode.DELAYED, ["affine_qparams", *OBSERVED], (-1.01, 3.02), 3.0),
        (Mode.FIRST, ["resolve_min_max", "affine_qparams", *OBSERVED], (-1.01, 3.02), 3.0),
    ],
)
def test_modes(mode: Mode, ops: list[str], state: tuple[float, float], high: float) -> None:
    model = Bound(mode)
    found, y = run(model)
    assert found == ops
    assert (model.low.item(), model.high.item()) == pytest.approx(state)
    assert y[0, 2].item() == pytest.approx(high, abs=0.01)


def test_unset_range_resolves_to_the_batch() -> None:
    nan = float("nan")
    model = Bound(Mode.RESOLVE, low=nan, high=nan)
    assert run(model)[1][0, 2].item() == pytest.approx(5, abs=0.02) and model.low.isnan()


def test_an_unset_range_that_is_delayed_is_the_batchs_once() -> None:
    nan = float("nan")
    model = Bound(Mode.FIRST, low=nan, high=nan)
    assert run(model)[1][0, 2].item() == pytest.approx(5, abs=0.02)
    assert (model.low.item(), model.high.item()) == (-2, 5)


def test_what_is_delayed_is_observed_behind_the_first_reader() -> None:
    """There, Inductor has the reduction join the loop that quantizes."""
    gm = captured(Bound(Mode.DELAYED), X)
    apply(BOUND, gm)
    assert show(gm).index(" = linear(") < show(gm).index(" = batch_min_max(")


@pytest.mark.parametrize(("found", "high"), [(Fixed(min=0, max=4), 4.0), (CurrentTensor(), 5.0)])
def test_stateless_ranges(found: Range, high: float) -> None:
    assert run(Bound(Mode.STATIC, found))[1][0, 2].item() == pytest.approx(high, abs=0.02)


def test_site_without_its_operator_is_declined() -> None:
    edge = Edge(path="", kind="conv", ordinal=0, operand="input")
    key = register((LocalSite(name="input", role="activation", spec=U8, edges=(edge,)),), "onnxruntime")

    def model(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        bind(key, [int(Mode.TRAIN)], [low, high])
        return x + 1

    gm = captured(model, X, torch.ones(1), torch.ones(1))
    (decline,) = apply(BOUND, gm).declines
    assert decline.reason == "the operators of site input are in another graph"


def quantized_reads(model: Callable[..., Any], *args: Tensor) -> list[str]:
    gm = captured(model, *args)
    apply(INSERT, gm)
    return [line for line in show(gm).splitlines() if " = linear(" in line or " = add(" in line]


def test_quantized_for_listed_operands_only() -> None:
    w = nn.Parameter(torch.eye(3))
    linear, add = quantized_reads(lambda x: F.linear(h := x.sin(), w) + h, X)
    assert "fake_quantize" in linear and "sin" in add


def test_quantized_before_active_dropout() -> None:
    gm = captured(lambda x: LINEAR(F.dropout(x.view(3), 0.5)), X)
    apply(INSERT, gm)
    (quantized,) = (n for n in gm.graph.nodes if n.name.startswith("fake_quantize_per_tensor"))
    assert quantized.args[0].op == "placeholder" and [n.name for n in quantized.users] == ["view"]


def test_tensor_changed_in_place_between_two_readers_stays_float() -> None:
    w = nn.Parameter(torch.eye(3))

    def model(x: Tensor) -> Tensor:
        h = x.sin()
        first = F.linear(h, w)
        h.view(-1).mul_(2)
        return first + F.linear(h, w)

    gm = captured(model, X)
    result = INSERT.run(gm)
    assert [d.reason for d in result.declines][:2] == ["one operand is changed in place while it is in use"] * 2
    torch.testing.assert_close(
        gm(*[w if n.meta["state"] else X for n in gm.graph.nodes if n.op == "placeholder"])[0], model(X)
    )


def test_untouched_without_operators() -> None:
    gm = captured(lambda x: x.sin() + 1, X)
    assert untouched(INSERT, gm).declines == untouched(BOUND, gm).declines == []
