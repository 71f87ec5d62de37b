"""What stages must not ask for, and what they say of themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import Stage
from fxquant.errors import InvalidArgument
from fxquant.prepared.quantizer import quantizers
from fxquant.spec.recipes import W4A8
from tests.nets import Mlp, TiedLanguageModel

X = torch.zeros(2, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fxquant.prepare(Mlp(), (X,), recipe="w4a8")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"at": -1, "weights": 8}, r"Stage\.at must be a number of steps, or a share .* got -1"),
        ({"at": 1.5, "weights": 8}, r"Stage\.at must be .* from 0\.0 to 1\.0: got 1\.5\. Write whole steps without"),
        ({"at": True, "weights": 8}, r"Stage\.at must be .*: got True"),
        ({"at": 0}, r"Stage must say what changes: got none of weights, activations, freeze_ranges.*\(at=0\)"),
        ({"at": 0, "sites": "*"}, "Stage must say what changes"),
        ({"at": 0, "weights": "int8"}, r"Stage\.weights must be 'float', 'observe', 'quantize' or .* got 'int8'"),
        ({"at": 0, "activations": 1}, r"Stage\.activations must be .* bits from 2 to 16: got 1\."),
        ({"at": 0, "activations": True}, r"Stage\.activations must be .*: got True"),
        ({"at": 0, "damping": -1.0}, r"Stage\.damping must be a finite number of at least 0: got -1\.0"),
        ({"at": 0, "damping": float("nan")}, r"Stage\.damping must be a finite number of at least 0: got nan"),
    ],
)
def test_a_stage_that_is_none(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Stage(**stage)


BITS = Stage(at=0.0, weights=8), Stage(at=0.25, weights=6), Stage(at=1.0, weights="quantize")
END = Stage(at=9, weights="quantize", activations="quantize")


@pytest.mark.parametrize(
    ("stages", "total", "message"),
    [
        ([], None, "stages must be fxquant.Stage objects, at least one: got None"),
        ([{"at": 0}], None, r"stages must be fxquant.Stage objects.*: got \{'at': 0\}"),
        ([Stage(at=5, freeze_ranges=True), Stage(at=5, weights="quantize")], None, r"got stages\[1\] at 5 after"),
        ([Stage(at=0.5, freeze_ranges=True), Stage(at=4, weights="quantize")], 10, r"in order.*stages\[1\] at 4 after"),
        ([Stage(at=0.5, freeze_ranges=True)], None, r"total_steps must be given .* got None \(stages\[0\]\.at=0\.5\)"),
        ([Stage(at=11, freeze_ranges=True)], 10, r"stages must begin within total_steps=10: got stages\[0\] at 11"),
        ([Stage(at=0, weights=8, sites="third.*"), END], None,
         r"stages\[0\]\.weights must be said of a site: got sites='third\.\*', which names none.*weights: first\."),
        ([Stage(at=0, weights="observe"), END], None, r"weights must not be 'observe' where no range follows the data"),
        ([Stage(at=0, weights=4), END], None, r"weights must be more bits than an integer .* got 4, and first\.weig"),
        ([Stage(at=0, weights=8)], None, r"must end with every site as the plan has it: got 2 that are not \(first"),
        ([Stage(at=0, activations="float")], None, r"must end with .* End with weights='quantize' and activations='q"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(model: nn.Module, stages: Any, total: int | None, message: str) -> None:
    before = {key: (q.doing, q.spec) for key, q in quantizers(model)}
    with pytest.raises(InvalidArgument, match=message):
        fxquant.Schedule(model, stages, total_steps=total)
    assert {key: (q.doing, q.spec) for key, q in quantizers(model)} == before


def test_a_schedule_that_names_no_site() -> None:
    weights_only = fxquant.prepare(nn.Sequential(nn.Linear(32, 8)), (torch.zeros(2, 32),), recipe="int4_weight_only")
    with pytest.raises(InvalidArgument, match=r"stages\[0\]\.activations must be said of a site.*activations: none"):
        fxquant.Schedule(weights_only, [Stage(at=0, activations="observe"), END])


def test_bits_of_small_floats() -> None:
    floats = fxquant.prepare(Mlp(), (X,), recipe="fp8", target="generic")
    with pytest.raises(InvalidArgument, match=r"weights must be more bits than an integer .* got 16, and .* has e4m3"):
        fxquant.Schedule(floats, [Stage(at=0, weights=16), END])


def test_a_model_that_is_not_prepared() -> None:
    with pytest.raises(InvalidArgument, match="Schedule must be given a prepared model: got Mlp without a plan"):
        fxquant.Schedule(Mlp(), [END])


def test_damping_of_a_weight_that_is_no_modules_own() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.inner(x), self.table)

    found = fxquant.prepare(Functional(), (X,))
    with pytest.raises(
        InvalidArgument, match=r"stages\[0\]\.damping must be said of weights .* got 1 that are not \(\w+"
    ):
        fxquant.Schedule(found, [Stage(at=0, damping=0.1)])
    assert fxquant.Schedule(found, [Stage(at=0, damping=0.1, sites="inner.*")]).damps


def test_shares_are_of_all_steps(model: nn.Module) -> None:
    schedule = fxquant.Schedule(model, [*BITS], total_steps=10)
    assert [begin for begin, _ in schedule.state_dict()["stages"]] == [0, 2, 10]
    assert str(schedule).splitlines()[-1].split() == ["10", "weights", "quantize"]
    schedule.seek(10)


def test_a_step_that_is_none(model: nn.Module) -> None:
    with pytest.raises(InvalidArgument, match="steps must be a whole number of at least 0: got -1"):
        fxquant.Schedule(model, [END]).seek(-1)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"weights": 8, "activations": "observe"}, "weights 8 bits, activations observe"),
        ({"weights": "float", "sites": "head.*"}, "weights float, of head.*"),
        ({"freeze_ranges": True, "freeze_batch_norm": False}, "freeze ranges, unfreeze BatchNorm"),
        ({"damping": 0.001, "batch_norm_data": [X]}, "damping 0.001, BatchNorm re-estimated"),
    ],
)
def test_words(stage: dict[str, Any], words: str) -> None:
    assert str(Stage(at=0, **stage)) == words


def test_damping_counts_a_tied_weight_once() -> None:
    recipe = dataclasses.replace(W4A8, rules=())  # one format for the table and the product
    tied = fxquant.prepare(TiedLanguageModel(), (torch.zeros(2, 3, dtype=torch.int64),), recipe=recipe)
    schedule = fxquant.Schedule(tied, [Stage(at=0, damping=1.0)])
    expected = sum(_distance(weight, 7) for weight in {tied.head.weight, tied.mix.weight})
    assert schedule.damping().item() == pytest.approx(float(expected), rel=1e-5)


def _distance(weight: torch.Tensor, top: int) -> torch.Tensor:
    """``Σ (Q(w) − w)²`` of one scale for each row, in float64."""
    w = weight.detach().double()
    scale = w.abs().amax(1, keepdim=True) / top
    return ((w / scale).round() * scale - w).square().sum()
