"""Arithmetic over fractions, with the one rounding that a claim is about: what the numerics are held against."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

# dtype → stored mantissa bits, smallest exponent of a normal number
_LAYOUT = {torch.float32: (23, -126), torch.float64: (52, -1022), torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def nearest(value: Fraction, dtype: torch.dtype = torch.float32) -> float:
    """The value of a dtype that lies nearest to a fraction, the even one of two; infinity beyond its end."""
    if value == 0:
        return 0.0
    mantissa, lowest = _LAYOUT[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, lowest) - mantissa)
    rounded = half_even(magnitude / step) * step
    if rounded > Fraction(torch.finfo(dtype).max):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def half_even(value: Fraction) -> int:
    """The nearest integer, the even one of two."""
    return round(value)


def divided(x: float, y: float, dtype: torch.dtype = torch.float32) -> float:
    """``x / y`` of finite numbers, rounded once."""
    return nearest(Fraction(x) / Fraction(y), dtype)


def product(x: float, y: float, dtype: torch.dtype = torch.float32) -> float:
    """``x · y``, rounded once."""
    return nearest(Fraction(x) * Fraction(y), dtype)


def total(x: float, y: float, dtype: torch.dtype = torch.float32) -> float:
    """``x + y``, rounded once."""
    return nearest(Fraction(x) + Fraction(y), dtype)


def finite_values(seed: int, count: int, low: int = -60, high: int = 60) -> Tensor:
    """float32 numbers of all bit patterns with exponents from ``low`` to ``high``, and both signs."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(0, 2**23, (count,), generator=generator, dtype=torch.int32)
    exponent = torch.randint(low + 127, high + 128, (count,), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int32)
    return ((exponent << 23) | mantissa).view(torch.float32) * (1 - 2 * signs)
