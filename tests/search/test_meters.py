"""How far a result is from the float one: sums against float64, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.probe.visitor import Use
from fxquant.search.meters import ErrorMeter, LossMeter, parts
from fxquant.search.operator_runs import OperatorRun
from fxquant.search.sweep import Sweep, all_but, only


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- errors of outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_cost_is_the_squared_distance(dtype: torch.dtype) -> None:
    reference, output = random(7, 5).to(dtype), random(7, 5, seed=1).to(dtype)
    meter = ErrorMeter(reference)
    assert meter.total == pytest.approx(float(reference.double().square().sum()), rel=1e-6)
    assert meter.cost(output) == pytest.approx(float((output.double() - reference.double()).square().sum()), rel=1e-6)
    assert meter.cost(reference) == 0.0 and meter.float_loss == 0.0


def test_every_float_output_counts_and_nothing_else() -> None:
    reference = {"y": random(3), "n": 4, "index": torch.arange(3), "parts": [random(2, seed=1)]}
    output = {"y": random(3) + 1, "n": 5, "index": torch.arange(3) + 9, "parts": [random(2, seed=1) - 2]}
    assert ErrorMeter(reference).cost(output) == pytest.approx(3 * 1 + 2 * 4, rel=1e-6)


def test_places_where_the_float_output_is_not_finite_count_nothing() -> None:
    reference = torch.tensor([1.0, -math.inf, math.nan, 2.0])
    meter = ErrorMeter(reference)
    assert meter.total == 5.0
    assert meter.cost(torch.tensor([2.0, 7.0, 7.0, 2.0])) == 1.0


def test_a_result_that_is_no_number_is_infinitely_far() -> None:
    meter = ErrorMeter(torch.ones(2))
    assert meter.cost(torch.tensor([1.0, math.nan])) == math.inf
    assert meter.cost(torch.tensor([1.0, math.inf])) == math.inf


def test_large_outputs_are_summed_in_float64() -> None:
    many = torch.full((3_000_000,), 0.1)
    assert ErrorMeter(many).total == pytest.approx(3_000_000 * float(many[0].double()) ** 2, rel=1e-6)


@pytest.mark.parametrize("output", [torch.arange(3), None, (1, "a")], ids=["integers", "nothing", "no tensor"])
def test_without_a_float_output_a_loss_is_needed(output: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must return a floating-point tensor .* Pass loss="):
        ErrorMeter(output)


# ---------------------------------------------------------------- losses


def test_a_loss_counts_above_the_float_one() -> None:
    meter = LossMeter(lambda y, t: (y - t).abs().sum(), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert meter.float_loss == 3.0 and meter.total == 1.0
    assert meter.cost(torch.tensor([1.0, 1.0])) == -1.0, "a loss may fall"
    assert meter.cost(torch.tensor([math.nan, 1.0])) == math.inf


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y, t: y, r"loss must give one number: got a tensor of shape \(2,\)"),
        (lambda y, t: math.inf, "loss must be finite for the float model: got inf"),
    ],
    ids=["a tensor", "infinite"],
)
def test_losses_that_are_refused(loss: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LossMeter(loss, torch.ones(2), None)


def test_parts_of_a_batch() -> None:
    x, target = torch.ones(2), object()
    assert parts({"x": x}, None) == (((), {"x": x}), None)
    assert parts([(x, x), target], lambda y, t: 0.0) == (((x, x), {}), target)
    with pytest.raises(InvalidArgument, match=r"must be a pair .* got tuple of 3"):
        parts((x, x, target), lambda y, t: 0.0)


# ---------------------------------------------------------------- sums and switches


@pytest.mark.parametrize(
    ("measure", "total", "cost", "effect"),
    [
        ("output error", 16.0, 4.0, 0.5),
        ("output error", 0.0, 0.0, 0.0),
        ("output error", 0.0, 1.0, math.inf),
        ("loss", 4.0, 2.0, 0.5),
        ("loss", 4.0, -2.0, -0.5),
    ],
)
def test_effects(measure: str, total: float, cost: float, effect: float) -> None:
    assert Sweep(measure, {}, total=total).effect(cost) == effect


def test_the_float_loss_is_a_mean_and_only_of_losses() -> None:
    assert Sweep("loss", {}, total=4.0, loss_sum=6.0).float_loss == 1.5
    assert Sweep("output error", {}, total=4.0).float_loss is None


@pytest.mark.parametrize(
    ("keys", "alone", "without"),
    [(("b",), True, False), (("a",), False, True), (("a", "b"), False, False), (("b", "c"), True, False)],
    ids=["another", "it alone", "it and another", "two others"],
)
def test_switches_of_a_site_that_others_share(keys: tuple[str, ...], alone: bool, without: bool) -> None:
    """True where the float tensor goes on."""
    x, y = torch.zeros(1), torch.ones(1)
    use = Use(keys=keys, role="activation", input=x, scale=y, zero_point=x, compute=lambda: y)
    assert (only({"a"})(use) is x) is alone and (all_but({"a"})(use) is x) is without


@pytest.mark.parametrize(
    ("macs", "operands", "integer"),
    [
        (6, {"input": ("a",), "weight": ("b", "c")}, True),
        (6, {"input": ("a",), "weight": ()}, False),
        (0, {"input": ("a",)}, False),
    ],
    ids=["both quantized", "a float weight", "no product"],
)
def test_integer_products(macs: int, operands: dict[str, tuple[str, ...]], integer: bool) -> None:
    one = OperatorRun("linear", macs, operands)
    assert one.is_integer is integer
    assert one.keys == {key for keys in operands.values() for key in keys}
