from __future__ import annotations

import math

import pytest
import torch

from fxquant.numerics.division import ROUNDINGS, divide_by_number, reciprocal
from tests.numerics.exact import divided, finite_values
from tests.ops.oracle import assert_same_bits


@pytest.mark.parametrize("number", [3.0, 7.0, 127.0, 255.0, 448.0, 0.1])
def test_a_quotient_is_rounded_once(number: float) -> None:
    """A product with the reciprocal, which torch makes of a division by a number on CUDA, differs."""
    x = finite_values(0, 2000)
    number = float(torch.tensor(number))
    expected = torch.tensor([divided(value, number) for value in x.tolist()])
    assert_same_bits(divide_by_number(x, number), expected)
    assert not torch.equal(x * (1.0 / torch.tensor(number)), expected), "the cases tell one rounding from two"


def test_a_reciprocal_is_rounded_once() -> None:
    x = finite_values(1, 2000)
    assert_same_bits(reciprocal(x), torch.tensor([divided(1.0, value) for value in x.tolist()]))


def test_doubles_stay_doubles() -> None:
    x = finite_values(2, 500).double() / 3
    expected = torch.tensor([divided(value, 7.0, torch.float64) for value in x.tolist()], dtype=torch.float64)
    assert_same_bits(divide_by_number(x, 7.0), expected)


def test_specials_follow_ieee() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38])
    assert_same_bits(divide_by_number(x, 2.0), torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.0, 1.7e38]))
    inverse = reciprocal(torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]))
    assert_same_bits(inverse, torch.tensor([math.nan, 0.0, -0.0, math.inf, -math.inf]))


def test_the_roundings_are_two() -> None:
    assert ROUNDINGS == ("reciprocal", "divide")
