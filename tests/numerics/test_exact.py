"""The oracle itself, against conversions that Python and torch are known to round once."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.numerics.exact import finite_values, nearest


def test_doubles_become_what_a_cast_makes_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64) * torch.exp2(torch.arange(-150.0, 100.0, 0.5))
    assert [nearest(Fraction(value)) for value in values.tolist()] == values.float().tolist()
    halves = values.float().clamp(-7e4, 7e4)
    for dtype in (torch.bfloat16, torch.float16):
        found = [nearest(Fraction(value), dtype) for value in halves.tolist()]
        assert found == halves.to(dtype).to(torch.float64).tolist()


@pytest.mark.parametrize(
    ("value", "expected"), [(1 + 2.0**-24, 1.0), (1 + 3 * 2.0**-24, 1 + 2.0**-22), (2.0**128, float("inf"))]
)
def test_ties_go_to_even_and_what_is_too_large_to_infinity(value: float, expected: float) -> None:
    assert nearest(Fraction(value)) == expected and nearest(-Fraction(value)) == -expected


def test_values_have_all_mantissas_and_the_exponents_asked_for() -> None:
    values = finite_values(0, 1000, -3, 3)
    assert (values.abs() >= 2.0**-3).all() and (values.abs() < 2.0**4).all()
    assert (values > 0).any() and (values < 0).any() and values.unique().numel() > 990
