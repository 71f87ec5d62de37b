"""sqnr against ratios by hand: the use of a site is made up, the run that gives it is tested with `record`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.probe.recording import NamedVisit
from fxquant.probe.visitor import Use
from fxquant.report import sqnr

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def use(x: Tensor, y: Tensor) -> Use:
    """A site that made ``y`` of ``x``."""
    return Use(keys=("site",), role="activation", input=x, scale=ONE, zero_point=ZERO, compute=lambda: y)


@pytest.fixture
def model() -> nn.Module:
    return fxquant.prepare(nn.Linear(2, 2), (torch.ones(1, 2),))


def ratios(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **uses: Use) -> dict[str, float]:
    """What sqnr makes of a run with these uses."""

    def run(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, visit: NamedVisit) -> None:
        for key, one in uses.items():
            assert visit(key, one) is None, "sqnr changes no tensor"

    monkeypatch.setattr(sys.modules["fxquant.report.sqnr"], "record", run)
    return sqnr(model, (torch.ones(1, 2),))


SIGNAL = torch.tensor([6.0, 8.0])  # Σ x² = 100


@pytest.mark.parametrize(
    ("noise", "decibels"),
    [([1.0, 0.0], 20.0), ([0.0, -10.0], 0.0), ([-0.1, 0.0], 40.0), ([30.0, 10.0], -10.0), ([0.0, 0.0], math.inf)],
    ids=["a hundredth", "as much", "a ten-thousandth", "more than signal", "none"],
)
def test_decibels_of_signal_to_noise(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, noise: list[float], decibels: float
) -> None:
    found = ratios(model, monkeypatch, a=use(SIGNAL, SIGNAL + torch.tensor(noise)))
    assert found == {"a": pytest.approx(decibels, abs=1e-4)}


def test_a_tensor_of_zeros_loses_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros(3)
    assert ratios(model, monkeypatch, a=use(zeros, zeros), b=use(zeros, zeros + 1)) == {"a": math.inf, "b": math.inf}


def test_squares_that_half_precision_cannot_hold(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((4,), 1000.0, dtype=torch.float16)  # 1000² is above its largest number
    tiny = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    found = ratios(model, monkeypatch, large=use(x, x - 10), small=use(tiny, 2 * tiny))
    assert found["large"] == pytest.approx(40.0) and found["small"] == pytest.approx(0.0, abs=1e-9)


def test_ratios_come_in_the_order_of_the_run(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    one = use(SIGNAL, SIGNAL + 1)
    assert list(ratios(model, monkeypatch, **{"b": one, "a": one, "a@1": one})) == ["b", "a", "a@1"]


def test_what_fits_the_codes_loses_nothing() -> None:
    """Weights that are whole multiples of their scale, an input of 0…255 and one of halves between."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[127.0, -3.0]])
    x = torch.tensor([[0.0, 255.0], [7.0, 100.0]])
    fxquant.calibrate(fxquant.prepare(model, (x,)), [x], progress=False)
    assert sqnr(model, (x,)) == {"input": math.inf, "weight": math.inf}
    between = x + torch.tensor([[0.0, 0.0], [0.25, 0.0]])
    wanted = 10 * math.log10(float(between.double().square().sum()) / 0.25**2)
    assert sqnr(model, (between,)) == {"input": pytest.approx(wanted), "weight": math.inf}


def test_keyword_inputs() -> None:
    x = torch.tensor([[0.0, 255.0]])
    model = fxquant.calibrate(fxquant.prepare(nn.Linear(2, 2), (x,)), [x], progress=False)
    assert sqnr(model, (), {"input": x}) == sqnr(model, (x,))
