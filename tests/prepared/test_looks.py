"""What is said of ranges that no data has set, when a model is evaluated with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import RangeNotSetWarning
from tests.nets import Mlp, prepared, step

EAGER = "fxquant_eager"
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def evaluate(model: nn.Module, backend: str = EAGER) -> list[str]:
    """What two batches say."""
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend=backend)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        compiled(X), compiled(-X)
    return [str(each.message) for each in told if each.category is RangeNotSetWarning]


@pytest.mark.parametrize("backend", [EAGER, "fxquant"])
def test_the_first_batch_tells_which_sites_have_seen_no_data(backend: str) -> None:
    model = prepared(Mlp(), X)
    (told,) = evaluate(model, backend)
    keys = [key for key, q in fxquant.prepared.quantizer.quantizers(model) if q.site.role != "weight"]
    assert told == (
        f"{len(keys)} activation ranges are set by no data yet: {', '.join(keys)}. They are quantized with the range "
        "of each batch, which no file has. Call fxquant.calibrate(model, data) first, or train."
    )
    assert evaluate(model, backend) == [], "once for a model"


def calibrated(model: nn.Module) -> None:
    fxquant.calibrate(model, [(X,)])


def trained(model: nn.Module) -> None:
    step(torch.compile(model, backend=EAGER), X)


@pytest.mark.parametrize("make_ready", [calibrated, trained], ids=lambda each: each.__name__)
def test_nothing_is_said_where_data_was_seen(make_ready: Callable[[nn.Module], None]) -> None:
    model = prepared(Mlp(), X)
    make_ready(model)
    assert evaluate(model) == []


def test_frozen_ranges_that_are_unset_are_told_of_in_training_too() -> None:
    model = prepared(Mlp(), X)
    fxquant.freeze_ranges(model)
    with pytest.warns(RangeNotSetWarning, match=r"^\d activation ranges are set by no data yet"):
        step(torch.compile(model, backend=EAGER), X)


class Trained(nn.Module):
    """A product that training alone runs, of the module that evaluation runs too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.one)
        return x + nn.functional.linear(x.relu(), self.other) if self.training else x


def test_what_training_alone_runs_may_stay_unset() -> None:
    model = prepared(Trained(), X)
    fxquant.calibrate(model.eval(), [(X,)])
    run, left = [q for _, q in fxquant.prepared.quantizer.quantizers(model) if q.site.role != "weight"]
    assert run.is_set() and not left.is_set()
    run.resolved = False  # as after training: the graph looks whether it is set
    assert evaluate(model) == []


def test_weights_have_their_range_in_themselves() -> None:
    weight = fxquant.QuantSpec(bits=8, narrow=True, axis=0, range=fxquant.Learned(method="lsq"))
    model = prepared(Mlp(), X, recipe=fxquant.Recipe(name="learned weights", weight=weight))
    (told,) = evaluate(model)
    assert "weight" not in told and told.startswith("2 activation ranges")
    calibrated(model)
    for _, quantizer in fxquant.prepared.quantizer.quantizers(model):
        if quantizer.site.role == "weight":
            with torch.no_grad():
                for name, value in quantizer.range.initial_state(quantizer.spec, 8).items():
                    getattr(quantizer, name).copy_(value)
            quantizer.settle()
    fxquant.prepared.root.unwrap(model)._fxquant_root.told_unset = False
    assert evaluate(model) == []


def test_one_site_that_lacks_data_is_named_alone() -> None:
    model = prepared(Mlp(), X)
    calibrated(model)
    (key, quantizer), *_ = [(k, q) for k, q in fxquant.prepared.quantizer.quantizers(model) if q.site.role != "weight"]
    with torch.no_grad():
        for name, value in quantizer.range.initial_state(quantizer.spec, 1).items():
            getattr(quantizer, name).copy_(value)
    quantizer.settle()
    (told,) = evaluate(model)
    assert told.startswith(f"1 activation ranges are set by no data yet: {key}. ")
