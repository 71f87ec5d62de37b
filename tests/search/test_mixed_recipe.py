"""prepare(recipe=fxquant.Mixed(…)): the same as the single calls, recorded as overrides, all undone on errors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.report import sqnr
from fxquant.search.mixed_recipe import Mixed
from tests.nets import ConvNet, ranges, step, unset

SIX = torch.randn(32, 6, generator=torch.Generator().manual_seed(4))
LABELS = torch.randint(0, 6, (32,), generator=torch.Generator().manual_seed(5))


class Outlier(nn.Module):
    """Three layers with dropout and BatchNorm beside them; the second's weights have an outlying column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        with torch.no_grad():
            self.b.weight[:, 0] *= 30.0

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.a(x))) + self.b(x) + self.c(x)


def bits(model: nn.Module) -> dict[str, int]:
    return {key: q.spec.bits for key, q in quantizers(model) if key.endswith("weight")}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that prepare could have left behind."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [(type(m), m.training, sorted(m.__dict__), sorted(m._modules)) for m in model.modules()]
    return {key: value.tolist() for key, value in values.items()}, attributes


def test_it_is_prepare_calibrate_mixed_and_override() -> None:
    torch.manual_seed(0)
    model = fxquant.prepare(Outlier(), (SIX,), recipe=fxquant.Mixed(data=[SIX], weight_bytes=2 / 3, bits=(4, 8)))
    assert bits(model) == {"a.weight": 4, "b.weight": 8, "c.weight": 4} and unset(model) == []
    by_hand = fxquant.calibrate(fxquant.prepare(Outlier(), (SIX,)), [SIX])
    fxquant.override(by_hand, fxquant.mixed(by_hand, [SIX], weight_bytes=2 / 3, bits=(4, 8)))
    assert ranges(model) == ranges(by_hand)
    ours, theirs = plan_of(model), plan_of(by_hand)
    assert ours is not None and theirs is not None and ours == theirs
    assert {site.reason.partition("; ")[2] for site in ours.sites if site.key == "b.weight"} == {
        "format by override('b.weight')"
    }


def test_integers_by_budget() -> None:
    model = fxquant.prepare(Outlier(), (SIX,), recipe=fxquant.Mixed(data=[SIX], integer_share=0.6))
    left = {"a.weight", "b.weight", "c.weight"} - bits(model).keys()
    assert left == {"b.weight"}
    plan = plan_of(model)
    assert plan is not None and "left in float by override('b.weight')" in {d.reason for d in plan.declined}
    coverage = fxquant.explain(model, (SIX,)).coverage
    assert coverage is not None and coverage.share == pytest.approx(2 / 3)
    assert [one.reason for one in coverage.products if not one.quantized] == ["left in float by override('b.weight')"]


def test_it_trains_deploys_and_travels_in_checkpoints(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 6, 6)
    recipe = fxquant.Mixed(data=[images], weight_bytes=0.7, bits=(4, 8))
    model = fxquant.prepare(ConvNet(), (images,), recipe=recipe)
    assert set(bits(model).values()) == {4, 8}
    torch._dynamo.reset()
    assert step(torch.compile(model, backend="fxquant_eager"), images).isfinite().all()
    chosen = {key: q.spec for key, q in quantizers(model)}
    other = fxquant.override(fxquant.prepare(ConvNet(), (images,)), chosen)
    other.load_state_dict(model.state_dict())
    assert bits(other) == bits(model) and ranges(other) == ranges(model)
    with pytest.raises(PlanMismatch, match="s8 axis 0 in the model, s4 axis 0 in the checkpoint"):
        fxquant.prepare(ConvNet(), (images,)).load_state_dict(model.state_dict())
    model.eval()
    fxquant.export_onnx(model, (images,), str(tmp_path / "mixed.onnx"))
    assert (tmp_path / "mixed.onnx").exists()


def test_a_loss_and_a_base_recipe() -> None:
    recipe = fxquant.Mixed(
        data=[(SIX, LABELS), (SIX[:8], LABELS[:8])],
        loss=F.cross_entropy,
        integer_share=1.0,
        base=fxquant.Recipe(name="kinds", kinds=frozenset({"linear"})),
    )
    model = fxquant.prepare(Outlier(), (SIX,), recipe=recipe, target="openvino")
    plan = plan_of(model)
    assert plan is not None and (plan.recipe, plan.target) == ("kinds", "openvino")
    assert len(bits(model)) == 3 and set(sqnr(model, (SIX,))) == {site.key for site in plan.sites}


def test_rules_hold_for_the_base() -> None:
    recipe = fxquant.Mixed(data=[SIX], weight_bytes=1.0, bits=(4, 8))
    model = fxquant.prepare(Outlier(), (SIX,), recipe=recipe, rules=[fxquant.skip("b")])
    assert set(bits(model)) == {"a.weight", "c.weight"}


# ---------------------------------------------------------------- errors leave nothing behind


class Broken:
    """Batches of which one cannot be had, at the ``at``-th reading of it."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.count = error, at, 0

    def __iter__(self) -> Iterator[Tensor]:
        yield SIX
        self.count += 1
        if self.count == self.at:
            raise self.error
        yield SIX


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the disk is gone")], ids=["interrupt", "error"])
@pytest.mark.parametrize("at", [1, 2], ids=["calibrating", "measuring"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before_after(error: BaseException, at: int, training: bool) -> None:
    model = Outlier().train(training)
    before = snapshot(model)
    with pytest.raises(type(error)):
        fxquant.prepare(model, (SIX,), recipe=fxquant.Mixed(data=Broken(error, at), weight_bytes=0.7))
    assert snapshot(model) == before and plan_of(model) is None
    fxquant.prepare(model, (SIX,))  # as if nothing had been


def loss_of_nan(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * float("nan")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_bytes": 0.49}, r"weight_bytes must be at least 0\.5"),
        ({"weight_bytes": 4.0, "bits": (None,)}, "the budget must leave a site quantized: got weight_bytes=4"),
        ({"weight_bytes": 1.0, "data": []}, "data must hold at least one batch: got none"),
        ({"weight_bytes": 1.0, "data": [SIX, 3]}, "each batch of data must be a tensor, .* got int"),
        ({"weight_bytes": 1.0, "loss": F.cross_entropy}, r"must be a pair \(arguments, target\) .* got Tensor"),
        ({"weight_bytes": 1.0, "loss": loss_of_nan, "data": [(SIX, LABELS)]}, "loss must be finite"),
    ],
    ids=["too few bytes", "all float", "no data", "no batch", "no pair", "no loss"],
)
def test_what_goes_wrong_on_the_way(given: dict[str, Any], message: str) -> None:
    model = Outlier()
    before = snapshot(model)
    with pytest.raises(InvalidArgument, match=message):
        fxquant.prepare(model, (SIX,), recipe=fxquant.Mixed(**{"data": [SIX], **given}))
    assert snapshot(model) == before and plan_of(model) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must be given one budget, weight_bytes or integer_share: got none"),
        ({"weight_bytes": 1.0, "integer_share": 1.0}, "got both"),
        ({"integer_share": 2.0}, "integer_share must be from 0 to 1: got 2.0"),
        ({"weight_bytes": 1.0, "bits": (1,)}, r"bits must hold widths from 2 to 16, or None for float: got \[1\]"),
        ({"weight_bytes": 1.0, "base": "int7"}, "recipe must be a Recipe or one of .*: got 'int7'"),
        (
            {"weight_bytes": 1.0, "data": iter([SIX])},
            "Mixed.data must be batches that can be read twice: got list_iter",
        ),
        ({"weight_bytes": 1.0, "data": 3}, "Mixed.data must be batches that can be read twice: got int"),
    ],
    ids=["none", "both", "share", "bits", "base", "iterator", "no data"],
)
def test_what_is_wrong_from_the_start(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fxquant.Mixed(**{"data": [SIX], **given})


def test_the_name_alone_says_what_is_missing() -> None:
    with pytest.raises(
        InvalidArgument,
        match=r"recipe 'mixed' must come with data and a budget: got its name alone\. Write recipe=fxquant\.Mixed\(",
    ):
        fxquant.prepare(Outlier(), (SIX,), recipe="mixed")


def test_it_is_a_value_that_prints_and_prepares_several_models() -> None:
    recipe = fxquant.Mixed(data=[SIX], weight_bytes=2 / 3, bits=(4, 8))
    assert isinstance(recipe, Mixed) and "tensor" not in repr(recipe) and "weight_bytes=0.66" in repr(recipe)
    net = Outlier()
    first, second = (fxquant.prepare(copy.deepcopy(net), (SIX,), recipe=recipe) for _ in range(2))
    assert plan_of(first) == plan_of(second)


def test_progress_is_drawn_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, bool]] = []

    def track(items: Any, description: str, *, show: bool = True) -> Any:
        drawn.append((description, show))
        return items

    for name in ("fxquant.probe.calibrate", "fxquant.search.sweep"):
        monkeypatch.setattr(sys.modules[name], "track", track)  # the package holds a function under the first name
    for show in (True, False):
        recipe = fxquant.Mixed(data=[SIX], weight_bytes=1.0, bits=(8,), progress=show)
        fxquant.prepare(Outlier(), (SIX,), recipe=recipe)
    assert drawn == [(word, show) for show in (True, False) for word in ("calibrating", "measuring")]
