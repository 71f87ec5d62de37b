"""Rounding to a small floating-point format, and quantizers made of it.

A magnitude a lies in a binade with a fixed step, and rounding to the format is rounding to a multiple of it::

    step    = 2^(max(floor(log2 a), emin) − mantissa_bits)
    carrier = max(head of a, 2^emin) · 2^(wide mantissa bits − mantissa_bits)
    y       = (a + carrier) − carrier

The carrier is so much larger than a that the last bit of their sum is worth one step: the addition rounds, half to
even, and the subtraction is exact. (The head is a in half its bits. With all of them, the sum could come into the next
binade, where the carrier itself would have a bit too many.) So there is one rounding, from float64 too, without
exponents taken apart: exp2 and log2 are approximations on some devices, and C++ moves bits between float and integer
registers by way of memory. A compiler that fuses multiplications with additions changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.formats import FloatFormat
from fxquant.numerics.stochastic import round_by_chance, uniform

# dtype → (integer of the same width, stored mantissa bits, exponent bias)
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def widen(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def exponent_bits(x: Tensor) -> Tensor:
    """The bits of x with all but the exponent field cleared, as an integer tensor; x is float32 or float64."""
    integer, mantissa, bias = _LAYOUT[x.dtype]
    return x.view(integer) & ((2 * bias + 1) << mantissa)


def power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) for a normal x, 0 for a subnormal one and for 0, inf for inf and NaN."""
    return exponent_bits(x).view(x.dtype)


def copysign_by_bits(magnitude: Tensor, x: Tensor) -> Tensor:
    """``copysign(magnitude, x)`` in float32, NaN too, by the bits.

    Inductor's C++ calls a function for each vector of `torch.copysign`, around which all registers go to memory.
    """
    sign = x.view(torch.int32) & -(2**31)
    return ((magnitude.view(torch.int32) & (2**31 - 1)) | sign).view(torch.float32)


def round_to_float(x: Tensor, format: FloatFormat, *, saturate: bool = True, uniform: Tensor | None = None) -> Tensor:
    """x rounded to the format's grid, half to even, in x's own dtype (float32 or float64).

    Zeros keep their sign and NaN stays NaN, in formats without a NaN too.

    Args:
        saturate: what lies beyond ``format.max``, inf too, becomes ±max. Else what rounds beyond it becomes ±inf, or
            NaN in a format without infinity; a format with neither always saturates.
        uniform: x's shape and dtype, in [0, 1): rounds the magnitude down or up by chance instead, up with the
            probability of its distance from below. Values of the grid never move.
    """
    saturate = saturate or not format.overflows
    # Without saturation the grid goes on for one step beyond max, which tells that max was passed.
    limit = format.max if saturate else 2.0 ** (format.emax + 1)
    magnitude = x.abs().clamp(max=limit)
    y = _round_half_even(magnitude, format) if uniform is None else _round_by_chance(magnitude, format, uniform)
    y = torch.copysign(y, x)
    return y if saturate else _overflow(y, format)


def _round_half_even(magnitude: Tensor, format: FloatFormat) -> Tensor:
    _, mantissa, _ = _LAYOUT[magnitude.dtype]
    shift = mantissa - format.mantissa_bits
    # Veltkamp's splitting: about the upper half of the bits. Not as a product with 2^k + 1: fused with the differences
    # after it, that would give all bits. A product with a power of two is exact, fused or not.
    upper = magnitude * 2.0 ** (mantissa // 2 + 1) + magnitude
    head = upper - (upper - magnitude)
    carrier = (head * 2.0**shift).clamp(min=2.0 ** (shift + format.emin))
    return (magnitude + carrier) - carrier


def _round_by_chance(magnitude: Tensor, format: FloatFormat, uniform: Tensor) -> Tensor:
    _, mantissa, bias = _LAYOUT[magnitude.dtype]
    lowest = (format.emin + bias) << mantissa
    step_bits = exponent_bits(magnitude).clamp(min=lowest) - (format.mantissa_bits << mantissa)
    step = step_bits.view(magnitude.dtype)
    reciprocal = (((2 * bias) << mantissa) - step_bits).view(magnitude.dtype)  # the exponent mirrored at the bias
    return round_by_chance(magnitude * reciprocal, uniform) * step


def _overflow(y: Tensor, format: FloatFormat) -> Tensor:
    if not format.has_infinity:
        return torch.where(y.abs() > format.max, float("nan"), y)
    beyond = torch.where(y < -format.max, -float("inf"), y)
    return torch.where(y > format.max, float("inf"), beyond)


def _divided(x: Tensor, scale: Tensor | None) -> Tensor:
    wide = widen(x)
    return wide if scale is None else wide / scale.to(wide.dtype)


def quantize_float(x: Tensor, scale: Tensor | None, format: FloatFormat, saturate: bool) -> Tensor:
    """``x / scale`` rounded to the format, as values of the grid in float32 (float64 for float64)."""
    return round_to_float(_divided(x, scale), format, saturate=saturate)


def dequantize_float(code: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``code · scale``: in float32 (float64 for a float64 result), rounded once to ``dtype``."""
    wide = code.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return (wide if scale is None else wide * scale.to(wide.dtype)).to(dtype)


def fake_quantize_float(
    x: Tensor, scale: Tensor | None, format: FloatFormat, saturate: bool, seed: Tensor | None
) -> Tensor:
    """``round_to_float(x / scale) · scale`` in x's dtype; ``seed`` makes the rounding stochastic."""
    steps = _divided(x, scale)
    noise = None if seed is None else uniform(seed, x, steps.dtype)
    return dequantize_float(round_to_float(steps, format, saturate=saturate, uniform=noise), scale, x.dtype)


def fake_quantize_float_backward(grad: Tensor, x: Tensor, scale: Tensor | None, format: FloatFormat) -> Tensor:
    """``grad`` where ``|x / scale| ≤ format.max``, 0 elsewhere and for NaN."""
    return torch.where(_divided(x, scale).abs() <= format.max, grad, 0.0)
