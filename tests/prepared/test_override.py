"""Formats changed on a prepared model: what changes, what stays, what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CurrentTensor, QuantSpec
from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from tests.onnx.agreement import assert_codes_agree

W4 = QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())
A4 = QuantSpec(bits=4, signed=False, symmetric=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    found = fxquant.prepare(Net(), (X,))
    torch.compile(found, backend="fxquant_eager")(X)
    return found


def specs(model: nn.Module) -> dict[str, str]:
    return {key: str(quantizer.spec) for key, quantizer in quantizers(model)}


def test_formats_change_and_ranges_stay(model: nn.Module) -> None:
    ranges = {key: (q.min_val.clone(), q.max_val.clone()) for key, q in quantizers(model) if q.stateful}
    compiled = torch.compile(model, backend="fxquant_eager")
    model.eval()
    eight = compiled(X)
    assert fxquant.override(model, {"*.weight": W4, "down.input": A4}) is model
    assert specs(model) == {
        "up.input": "u8",
        "up.weight": "s4 axis 0",
        "down.input": "u4",
        "down.weight": "s4 axis 0",
    }
    for key, quantizer in quantizers(model):
        if quantizer.stateful:
            assert (quantizer.min_val, quantizer.max_val) == ranges[key] and quantizer.resolved
    four = compiled(X)
    assert not torch.equal(eight, four)
    low, high = ranges["down.input"]
    inner = torch.relu(
        nn.functional.linear(_fake(X, *ranges["up.input"], 255), _weight(model.up.weight, 7), model.up.bias)
    )
    expected = nn.functional.linear(_fake(inner, low, high, 15), _weight(model.down.weight, 7), model.down.bias)
    torch.testing.assert_close(four, expected, rtol=1e-5, atol=1e-5)


def _fake(x: Tensor, low: Tensor, high: Tensor, top: int) -> Tensor:
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / top
    point = (-low / scale).round()
    return ((x / scale).round().add(point).clamp(0, top) - point) * scale


def _weight(w: Tensor, top: int) -> Tensor:
    scale = w.detach().abs().amax(1, keepdim=True) / top
    return (w.detach() / scale).round().clamp(-top, top) * scale


def test_none_leaves_a_site_in_float_and_says_so(model: nn.Module) -> None:
    fxquant.override(model, {"up.*": None})
    assert set(specs(model)) == {"down.input", "down.weight"}
    plan = plan_of(model)
    assert plan is not None
    found = [d.reason for d in plan.declined if d.where.startswith("up.")]
    assert found == ["left in float by override('up.*')"] * 2
    assert "left in float by override('up.*')" in str(fxquant.explain(model))


def test_the_first_pattern_decides(model: nn.Module) -> None:
    fxquant.override(model, {"up.weight": None, "*.weight": W4})
    assert specs(model) == {"up.input": "u8", "down.input": "u8", "down.weight": "s4 axis 0"}


def test_flags_of_quantizers_stay(model: nn.Module) -> None:
    fxquant.freeze_ranges(model)
    fxquant.override(model, {"down.input": A4})
    assert [q.observing for _, q in quantizers(model)] == [False] * 4


def test_over_which_ranks_ranges_are_reduced_stays(model: nn.Module) -> None:
    fxquant.sync_ranges(model, enabled=False, when="before")
    fxquant.override(model, {"up.weight": None})
    assert {(bound.group, bound.before) for bound in bound_forwards(model).values()} == {("", True)}


def test_a_checkpoint_from_before_belongs_to_another_plan(model: nn.Module) -> None:
    before = model.state_dict()
    fxquant.override(model, {"down.input": A4})
    with pytest.raises(PlanMismatch, match=r"down\.input: u4 in the model, u8 in the checkpoint"):
        model.load_state_dict(before)
    model.load_state_dict(model.state_dict())
    fxquant.strip(model)
    assert not any("quantizers" in key for key in model.state_dict())


def test_export_follows(model: nn.Module, tmp_path: Any) -> None:
    fxquant.override(model, {"*.weight": W4})
    fxquant.export_onnx(model, (X,), tmp_path / "model.onnx")
    report = fxquant.verify_onnx(model, (X,), tmp_path / "model.onnx")
    assert_codes_agree(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up.weigth": W4}, r"changes must each match a site: got none for 'up\.weigth' .*Sites: up\.weight"),
        ({"*": None, "up.*": None}, r"got none for 'up\.\*' \(or an earlier pattern took all it matches\)"),
        ({"*": None}, "changes must leave a site to quantize: got none. fxquant.strip gives"),
        ({"up.input": W4}, r"changes\['up\.input'\]\.axis must be None: got 0"),
        ({"up.weight": A4}, r"changes\['up\.weight'\]\.range must be CurrentTensor"),
        ({"up.weight": "int4"}, r"changes\['up\.weight'\] must be a QuantSpec, or None for float: got 'int4'"),
    ],
)
def test_errors_leave_the_model_as_it_was(model: nn.Module, changes: dict[str, Any], message: str) -> None:
    before = specs(model)
    with pytest.raises(InvalidArgument, match=message):
        fxquant.override(model, changes)
    assert specs(model) == before


@pytest.mark.parametrize("step", ["detach", "attach"])
def test_an_interrupt_leaves_the_model_as_it_was(model: nn.Module, monkeypatch: Any, step: str) -> None:
    module = sys.modules["fxquant.prepared.override"]
    real, calls = getattr(module, step), []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        real(*args)
        if len(calls) == 1:
            raise KeyboardInterrupt

    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxquant.override(model, {"down.*": None, "up.input": A4})
    after = model.state_dict()
    assert before.keys() <= after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert set(specs(model).values()) == {"u8", "s8 axis 0"} and len(specs(model)) == 4


def test_only_a_prepared_model_can_be_changed() -> None:
    with pytest.raises(InvalidArgument, match="override must be given a prepared model"):
        fxquant.override(Net(), {"*": None})


def test_a_target_without_zero_points_refuses_them_and_rounds_as_it_does() -> None:
    """TensorRT reads uint8 codes as int8, and multiplies by the reciprocal of the scale."""
    model = fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),), target="tensorrt")
    message = r"^changes\['0\.input'\] must have signed and symmetric codes for target 'tensorrt': got u8"
    with pytest.raises(InvalidArgument, match=message):
        fxquant.override(model, {"0.input": QuantSpec(signed=False, symmetric=False)})
    fxquant.override(model, {"0.input": QuantSpec(narrow=True)})
    (site,) = (site for site in plan_of(model).sites if site.key == "0.input")
    assert site.local.spec.narrow and site.local.spec.rounding == "reciprocal"
