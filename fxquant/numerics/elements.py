"""Quantizers whose codes are small floats: one scale, or one for each slice of an axis.

::

    value = round(x / s), on the grid of the format, saturating           s that is 0 divides as 1 does
    y     = value · s                                                     so that it gives 0
    dx    = dy · [|x / s| ≤ max]

Arithmetic is float32 (float64 for float64 input), with one rounding to the input's dtype at the end. ``scale`` arrives
broadcastable against ``x``. A code is the format's own bits, right-aligned in a byte: sign, exponent, mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.affine import per_channel_view, rounded
from fxquant.numerics.division import Rounding, reciprocal
from fxquant.numerics.floating import round_to_float, widen
from fxquant.numerics.formats import FloatFormat

_MANTISSA, _BIAS = 23, 127  # of float32


def _steps(x: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    divisor = torch.where(scale == 0, 1.0, scale.to(torch.float32))
    return widen(x) / divisor if rounding == "divide" else widen(x) * reciprocal(divisor)


def quantize(x: Tensor, scale: Tensor, format: FloatFormat, rounding: Rounding) -> Tensor:
    """Values of the grid, as floats. NaN stays NaN."""
    return round_to_float(_steps(x, scale, rounding), format)


def fake_quantize(x: Tensor, scale: Tensor, format: FloatFormat, rounding: Rounding) -> Tensor:
    """``round(x / s) · s``, of x's dtype."""
    return rounded(quantize(x, scale, format, rounding) * scale.to(torch.float32), x.dtype)


def clip_mask(x: Tensor, scale: Tensor, format: FloatFormat, rounding: Rounding) -> Tensor:
    """Where the gradient passes; not where x is NaN."""
    return _steps(x, scale, rounding).abs() <= format.max


def encode(value: Tensor, format: FloatFormat) -> Tensor:
    """The code of each value of the grid, as uint8. NaN has the code of NaN; that of 0 in a format without NaN."""
    shift = _MANTISSA - format.mantissa_bits
    single = value.to(torch.float32)
    bits, magnitude = single.view(torch.int32), single.abs()
    below = (magnitude * (1.0 / format.smallest_subnormal)).to(torch.int32)
    above = (magnitude.view(torch.int32) >> shift) - ((_BIAS - format.bias) << format.mantissa_bits)
    code = torch.where(magnitude >= 2.0**format.emin, above, below)
    largest = (1 << (format.exponent_bits + format.mantissa_bits)) - 1
    code = torch.where(magnitude != magnitude, largest if format.has_nan else 0, code)
    sign = (bits >> (32 - format.bits)) & (largest + 1)
    # By way of float32, which holds a code exactly: Inductor's C++ narrows floats by vectors, integers one by one. So
    # are isnan and signbit, and a number of int64 would widen the sum: all in all it took ten times as long.
    return (code + sign).to(torch.float32).to(torch.uint8)


def decode(code: Tensor, format: FloatFormat) -> Tensor:
    """The values of codes, in float32: the inverse of `encode`. Bits above the format's own are not looked at."""
    sign = 1 << (format.exponent_bits + format.mantissa_bits)
    wide = code.to(torch.int32)
    magnitude = wide & (sign - 1)
    below = magnitude.to(torch.float32) * format.smallest_subnormal
    above = (magnitude + ((_BIAS - format.bias) << format.mantissa_bits)) << (_MANTISSA - format.mantissa_bits)
    value = torch.where(magnitude < (1 << format.mantissa_bits), below, above.view(torch.float32))
    if format.has_infinity:
        infinity = sign - (1 << format.mantissa_bits)
        value = torch.where(magnitude == infinity, float("inf"), torch.where(magnitude > infinity, float("nan"), value))
    elif format.has_nan:
        value = torch.where(magnitude == sign - 1, float("nan"), value)
    return torch.where((wide & sign) != 0, -value, value)


def scale_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, axis: int | None, format: FloatFormat, rounding: Rounding
) -> Tensor:
    """The gradient of the scale, of its shape, as LSQ has it: round(x / s) − x / s within the format, ±max beyond."""
    step = scale.reshape(()) if axis is None else per_channel_view(scale, x.dim(), axis)
    steps = _steps(x, step, rounding)
    value = round_to_float(steps, format)
    slope = torch.where(steps.abs() <= format.max, value - steps, value)
    others = [d for d in range(x.dim()) if d != axis]
    product = grad.to(steps.dtype) * slope
    return (product.sum(others) if others else product).reshape(scale.shape).to(scale.dtype)
