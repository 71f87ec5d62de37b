"""The affine quantizer against fractions: each rounding where the equation says that there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fxquant.numerics import affine
from fxquant.numerics.division import Rounding
from tests.numerics.exact import divided, finite_values, half_even, nearest, product, total
from tests.ops.oracle import assert_same_bits


@dataclass(frozen=True)
class Grid:
    name: str
    scale: float
    point: int
    low: int
    high: int

    def __str__(self) -> str:
        return self.name


GRIDS = (
    Grid("int8", 0.1, 0, -128, 127),
    Grid("uint8", 0.037, 113, 0, 255),
    Grid("int4", 1.7, -3, -8, 7),
    Grid("binary", 0.25, 1, 0, 1),
    Grid("16 bits", 1e-3, -5, -32768, 32767),
)
BOTH: tuple[Rounding, ...] = ("divide", "reciprocal")
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_rounding = pytest.mark.parametrize("rounding", BOTH)


def float32(value: float) -> float:
    return float(torch.tensor(value))


def inputs(grid: Grid) -> Tensor:
    """Spread over the range and past both ends, with the ties between codes."""
    ties = (torch.arange(grid.low - 2, min(grid.high + 2, grid.low + 300)) + 0.5 - grid.point) * float32(grid.scale)
    spread = torch.randn(400, generator=torch.Generator().manual_seed(0)) * grid.scale * (grid.high - grid.low) / 2
    return torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), spread])


def steps_of(x: float, scale: float, rounding: Rounding) -> int:
    """``round(x / scale)``, or with the rounded reciprocal."""
    quotient = divided(x, scale) if rounding == "divide" else product(x, divided(1.0, scale))
    return half_even(Fraction(quotient))


def value_of(code: int, grid: Grid, scale: float) -> float:
    inside = min(max(code, grid.low), grid.high)
    return product(inside - grid.point, scale)


def one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@each_rounding
@each_grid
def test_codes_values_and_masks_of_one_scale(grid: Grid, rounding: Rounding) -> None:
    x, scale = inputs(grid), float32(grid.scale)
    codes = [steps_of(value, scale, rounding) + grid.point for value in x.tolist()]
    given = (x, one(scale), one(grid.point, torch.int32))
    assert affine.code_before_clamp(*given, rounding).tolist() == codes
    rest = (grid.low, grid.high, rounding)
    clamped = affine.codes_per_tensor(*given, *rest)
    assert clamped.tolist() == [min(max(code, grid.low), grid.high) for code in codes]
    assert affine.fake_quantize_per_tensor(*given, *rest).tolist() == [value_of(c, grid, scale) for c in codes]
    inside = [grid.low <= code <= grid.high for code in codes]
    assert affine.clip_mask_per_tensor(*given, *rest).tolist() == inside
    assert any(inside) and not all(inside), "the cases lie on both sides of the ends"
    grad = torch.arange(1.0, len(codes) + 1)
    found = affine.fake_quantize_per_tensor_backward(grad, *given, *rest)
    assert found.tolist() == [g if passes else 0.0 for g, passes in zip(grad.tolist(), inside, strict=True)]


@each_rounding
def test_channels_are_tensors_of_their_own(rounding: Rounding) -> None:
    scales, points = torch.tensor([0.1, 0.037, 1.7]), torch.tensor([0, 3, -2], dtype=torch.int32)
    x = finite_values(3, 3 * 40, -6, 6).view(2, 3, 20)
    found = affine.fake_quantize_per_channel(x, scales, points, 1, -8, 7, rounding)
    masks = affine.clip_mask_per_channel(x, scales, points, 1, -8, 7, rounding)
    for channel in range(3):
        given = (x[:, channel], scales[channel], points[channel], -8, 7, rounding)
        assert_same_bits(found[:, channel], affine.fake_quantize_per_tensor(*given))
        assert torch.equal(masks[:, channel], affine.clip_mask_per_tensor(*given))
    grad = torch.ones_like(x)
    back = affine.fake_quantize_per_channel_backward(grad, x, scales, points, 1, -8, 7, rounding)
    assert torch.equal(back, masks.float())


@each_rounding
def test_no_zero_point_is_the_zero_point_0(rounding: Rounding) -> None:
    x = torch.cat([finite_values(4, 300, -6, 6), torch.tensor([0.0, -0.0, -1e-3, math.nan, math.inf])])
    ours = affine.code_before_clamp(x, one(0.3), None, rounding)
    assert_same_bits(ours, affine.code_before_clamp(x, one(0.3), one(0, torch.int32), rounding))


def test_a_fraction_of_a_zero_point_is_added_before_the_rounding() -> None:
    """torch's per-channel kernel: one rounding of the product with the sum."""
    scale, point = float32(0.3), float32(0.4)
    x = finite_values(5, 600, -8, 3)
    inverse = divided(1.0, scale)
    sums = [nearest(Fraction(value) * Fraction(inverse) + Fraction(point)) for value in x.tolist()]
    found = affine.code_before_clamp(x, one(scale), one(point), "reciprocal")
    assert found.tolist() == [half_even(Fraction(value)) for value in sums]


def test_a_tie_of_the_sum_keeps_its_side() -> None:
    """Where double rounds a sum onto a tie of float32, the second rounding must not go the other way."""
    inverse, point = 1.0, float32(2.0**24)
    values = torch.tensor([1 + 2.0**-23, 1 - 2.0**-24, 1.0, 3.0, 3 - 2.0**-22, -1.0])
    sums = [nearest(Fraction(value) * Fraction(inverse) + Fraction(point)) for value in values.tolist()]
    assert affine._float_code(values, one(inverse), one(point)).tolist() == sums


@pytest.mark.parametrize(
    ("code", "wrap", "expected"),
    [
        (math.nan, False, -8.0),
        (math.inf, False, 7.0),
        (-math.inf, False, -8.0),
        (1e30, False, 7.0),
        (math.nan, True, -8.0),
        (math.inf, True, -8.0),
        (1e30, True, -8.0),
        (-1e30, True, -8.0),
        (2.0**62, True, 7.0),
        (2.0**63, True, -8.0),
        (7.0, True, 7.0),
        (-9.0, False, -8.0),
    ],
)
def test_what_no_code_is(code: float, wrap: bool, expected: float) -> None:
    for dtype in (torch.float32, torch.float64):
        assert affine.clamp_code(one(code, dtype), -8, 7, wrap=wrap).item() == expected


def test_masks_leave_nan_out() -> None:
    code = torch.tensor([math.nan, -8.0, 7.0, -9.0, 8.0, math.inf])
    assert affine.clip_mask(code, -8, 7).tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32], ids=str)
def test_dequantize(dtype: torch.dtype) -> None:
    code, scale, point = torch.tensor([0, 1, 5, 100]).to(dtype), float32(0.1), 3
    expected = [product(value - point, scale) for value in (0, 1, 5, 100)]
    assert affine.dequantize(code, one(scale), one(point, torch.int32)).tolist() == expected
    assert affine.dequantize(code, one(scale), None).tolist() == [product(v, scale) for v in (0, 1, 5, 100)]


def test_a_double_becomes_a_half_by_way_of_float32() -> None:
    values = [1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-11 + 2.0**-40, 1e-9, 70000.0, math.pi]
    x = torch.tensor(values, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        twice = [nearest(Fraction(nearest(Fraction(value))), dtype) for value in values]
        assert affine.rounded(x, dtype).double().tolist() == twice
    assert_same_bits(affine.rounded(x, torch.float32), x.to(torch.float32))


@each_rounding
def test_halves_are_widened_and_rounded_once(rounding: Rounding) -> None:
    grid = GRIDS[1]
    scale = float32(grid.scale)
    for dtype in (torch.float16, torch.bfloat16):
        x = inputs(grid).to(dtype)
        expected = [
            nearest(Fraction(value_of(steps_of(value, scale, rounding) + grid.point, grid, scale)), dtype)
            for value in x.double().tolist()
        ]
        given = (x, one(scale), one(grid.point, torch.int32), grid.low, grid.high, rounding)
        found = affine.fake_quantize_per_tensor(*given)
        assert found.dtype == dtype and found.double().tolist() == expected


def test_a_view_per_channel() -> None:
    assert affine.per_channel_view(torch.ones(5), 4, 1).shape == (1, 5, 1, 1)
    assert affine.per_channel_view(torch.ones(5), 3, -1).shape == (1, 1, 5)


def test_the_sum_of_the_oracle_is_that_of_the_code() -> None:
    """Zero points of int32 are added to codes in float32: exact below 2²⁴, one rounding above."""
    x = torch.tensor([2.0**24 - 1, 2.0**24, -(2.0**24)])
    found = affine.code_before_clamp(x, one(1.0), one(1, torch.int32), "divide")
    assert found.tolist() == [total(value, 1.0) for value in x.tolist()]
