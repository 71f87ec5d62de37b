"""Quantizers whose range is a largest magnitude, against fractions and a table of floats."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fxquant.numerics import amax
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat
from tests.numerics.exact import divided, finite_values, half_even, nearest, product

FORMATS = [(8, False, True), (8, False, False), (8, True, True), (4, False, True), (2, False, False), (1, True, True)]
each_format = pytest.mark.parametrize(("num_bits", "unsigned", "narrow"), FORMATS)
REACH = float(torch.tensor(3.7))


def inputs() -> Tensor:
    spread = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    return torch.cat([spread, torch.tensor([0.0, REACH, -REACH, 2 * REACH, -2 * REACH, 1e30, -1e30])])


def limits(num_bits: int, unsigned: bool, narrow: bool) -> tuple[int, int]:
    highest = 2**num_bits - 1 if unsigned else 2 ** (num_bits - 1) - 1
    return (0 if unsigned else -highest - (0 if narrow else 1)), highest


def code_of(x: float, num_bits: int, unsigned: bool, narrow: bool) -> tuple[int, float]:
    """The code and its scale, each with the roundings that the equation has."""
    low, high = limits(num_bits, unsigned, narrow)
    scale = divided(high, REACH)
    return min(max(half_even(Fraction(product(x, scale))), low), high), scale


@each_format
def test_codes_and_values(num_bits: int, unsigned: bool, narrow: bool) -> None:
    assert amax.code_range(num_bits, unsigned, narrow) == limits(num_bits, unsigned, narrow)
    x, reach = inputs(), torch.tensor(REACH)
    codes, scale = amax.tensor_quant(x, reach, num_bits, unsigned, narrow)
    expected = [code_of(value, num_bits, unsigned, narrow) for value in x.tolist()]
    assert codes.tolist() == [code for code, _ in expected] and scale.item() == expected[0][1]
    values = amax.fake_tensor_quant(x, reach, num_bits, unsigned, narrow)
    assert values.tolist() == [divided(code, step) if code else 0.0 for code, step in expected]


@each_format
def test_gradients_are_those_of_the_equation(num_bits: int, unsigned: bool, narrow: bool) -> None:
    """``damax = Σ dy · (code − [|x| ≤ amax] · x · s) / B``, within the rounding of float32 sums."""
    x = inputs()[:-2]
    grad = torch.linspace(-1.0, 2.0, len(x))
    low, high = limits(num_bits, unsigned, narrow)
    exact = Fraction(0)
    for value, dy in zip(x.tolist(), grad.tolist(), strict=True):
        code, scale = code_of(value, num_bits, unsigned, narrow)
        value = max(value, 0.0) if unsigned else value
        scaled = Fraction(value) * Fraction(scale) if abs(value) <= REACH else Fraction(0)
        exact += Fraction(dy) * (code - scaled) / high
    found = amax.fake_tensor_quant_amax_gradient(grad, x, torch.tensor([REACH]), num_bits, unsigned, narrow)
    assert found.shape == (1,) and low <= 0 < high
    assert found.item() == pytest.approx(float(exact), rel=1e-4, abs=1e-4)
    inside = [dy if abs(value) <= REACH else 0.0 for value, dy in zip(x.tolist(), grad.tolist(), strict=True)]
    assert amax.clipped(grad, x, torch.tensor(REACH)).tolist() == inside


def test_a_range_that_holds_nothing_gives_0_and_can_grow() -> None:
    x = torch.tensor([5.0, -3.0, 0.0])
    for reach in (0.0, amax.EPSILON, -1.0):
        codes, scale = amax.tensor_quant(x, torch.tensor(reach), 8, False, True)
        assert codes.tolist() == [0.0] * 3 and scale.item() == 1.0
        grad = torch.tensor([1.0, 10.0, 100.0])
        found = amax.fake_tensor_quant_amax_gradient(grad, x, torch.tensor(reach), 8, False, True)
        assert found.item() == 1.0 - 10.0
    smallest = torch.nextafter(torch.tensor(amax.EPSILON), torch.tensor(1.0))
    assert amax.tensor_quant(x, smallest, 8, False, True)[0].tolist() == [127.0, -127.0, 0.0]


def test_nan_stays_nan() -> None:
    x = torch.tensor([math.nan, 1.0])
    assert math.isnan(amax.fake_tensor_quant(x, torch.tensor(1.0), 8, False, True)[0])
    assert amax.clipped(torch.ones(2), x, torch.tensor(1.0)).tolist() == [0.0, 1.0]


def test_a_range_for_each_slice() -> None:
    x = finite_values(0, 24, -3, 3).view(2, 3, 4)
    reach = torch.tensor([0.5, 1.0, 4.0]).view(1, 3, 1)
    whole = amax.fake_tensor_quant(x, reach, 8, False, True)
    grad = torch.ones_like(x)
    to_reach = amax.fake_tensor_quant_amax_gradient(grad, x, reach, 8, False, True)
    assert to_reach.shape == reach.shape
    for i in range(3):
        one = reach.reshape(-1)[i]
        assert torch.equal(whole[:, i], amax.fake_tensor_quant(x[:, i], one, 8, False, True))
        alone = amax.fake_tensor_quant_amax_gradient(grad[:, i], x[:, i], one, 8, False, True)
        torch.testing.assert_close(to_reach[0, i, 0], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_legacy_form_rounds_codes_and_scale_to_the_inputs_dtype(dtype: torch.dtype) -> None:
    x = inputs()[:-2].to(dtype)
    high = 127
    scale = divided(high, REACH)
    stored = nearest(Fraction(scale), dtype)
    found = amax.legacy_fake_tensor_quant(x, torch.tensor(REACH), 8, False, True)
    for value, y in zip(x.tolist(), found.double().tolist(), strict=True):
        code = min(max(half_even(Fraction(product(value, scale))), -high), high)
        assert y == nearest(Fraction(divided(nearest(Fraction(code), dtype), stored)), dtype)


def grid_of(format: FloatFormat) -> list[float]:
    """Every value of a format that is not negative."""
    subnormal = [m * format.smallest_subnormal for m in range(2**format.mantissa_bits)]
    normal = [
        (1 + m / 2**format.mantissa_bits) * 2.0**exponent
        for exponent in range(format.emin, format.emax + 1)
        for m in range(2**format.mantissa_bits)
    ]
    return [value for value in (*subnormal, *normal) if value <= format.max]


def on_grid(x: float, grid: list[float]) -> float:
    """The nearest value, of two the one with the even mantissa: that of the even place in the list."""
    magnitude = min(abs(x), grid[-1])
    distances = [(abs(Fraction(magnitude) - Fraction(value)), place % 2, value) for place, value in enumerate(grid)]
    return math.copysign(min(distances)[2], x)


@pytest.mark.parametrize("format", FLOAT_FORMATS.values(), ids=str)
def test_floats_scaled_to_their_largest_value(format: FloatFormat) -> None:
    x, grid = inputs()[:60], grid_of(format)
    scale = divided(format.max, REACH)
    found = amax.scaled_float(x, torch.tensor(REACH), format)
    back = divided(REACH, format.max)
    assert found.tolist() == [product(on_grid(product(value, scale), grid), back) for value in x.tolist()]
    assert amax.scaled_float(x, None, format).tolist() == [on_grid(value, grid) for value in x.tolist()]


def test_gradients_of_scaled_floats() -> None:
    format, x = FLOAT_FORMATS["e4m3"], inputs()[:-2]
    grad, grid, exact = torch.linspace(-1.0, 2.0, len(x)), grid_of(FLOAT_FORMATS["e4m3"]), Fraction(0)
    scale = divided(format.max, REACH)
    for value, dy in zip(x.tolist(), grad.tolist(), strict=True):
        scaled = Fraction(value) * Fraction(scale) if abs(value) <= REACH else Fraction(0)
        exact += Fraction(dy) * (Fraction(on_grid(product(value, scale), grid)) - scaled) / Fraction(format.max)
    found = amax.scaled_float_amax_gradient(grad, x, torch.tensor(REACH), format)
    assert found.item() == pytest.approx(float(exact), rel=1e-4, abs=1e-4)
    kept = amax.scaled_float_clipped(grad, x, torch.tensor(REACH), format)
    assert kept.tolist() == [dy if abs(v) <= REACH else 0.0 for v, dy in zip(x.tolist(), grad.tolist(), strict=True)]
    bare = amax.scaled_float_clipped(torch.ones(2), torch.tensor([448.0, 449.0]), None, format)
    assert bare.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.3, 1.7), (-3.0, -0.25), (-0.1, 0.0)])
def test_between_two_ends(low: float, high: float) -> None:
    """gemmlowp's scheme: a step, and the code of the lower end as zero."""
    low, high = (float(torch.tensor(end)) for end in (low, high))
    width = nearest(Fraction(high) - Fraction(low))
    step = divided(width, 255)
    zero = half_even(Fraction(divided(low, step))) + 128
    x = inputs()[:-2]
    found = amax.fake_affine_tensor_quant(x, torch.tensor(low), torch.tensor(high), 8)
    for value, y in zip(x.tolist(), found.tolist(), strict=True):
        code = min(max(half_even(Fraction(divided(value, step))) - zero, -128), 127)
        assert y == product(code + zero, step)
    grad = amax.between(torch.ones(len(x)), x, torch.tensor(low), torch.tensor(high))
    assert grad.tolist() == [float(low <= value <= high) for value in x.tolist()]


def test_ends_that_hold_nothing_give_0() -> None:
    x, low, high = torch.tensor([1.0, -1.0]), torch.tensor(2.0), torch.tensor(2.0)
    assert amax.fake_affine_tensor_quant(x, low, high, 8).tolist() == [0.0, 0.0]
    assert amax.between(torch.ones(2), x, low, high).tolist() == [0.0, 0.0]
