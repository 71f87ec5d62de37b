"""Quantizers whose parameters are trained: learnable affine, LSQ+, PACT, TQT.

All round half to even and clamp, y = dequantize(clamp(code, quant_min, quant_max)), and pass the gradient to ``x``
where nothing was clamped. One rounded code decides about both, so forward and backward never disagree about a value
at a tie. "Below" is what is not at least ``quant_min``, NaN included: it has the value and the gradients of
``quant_min``.

Arithmetic is float32 (float64 for float64 input), with one rounding to the input's dtype at the end; the gradients of
the parameters are summed in the same dtype, then rounded to the parameter's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.numerics.affine import clamp_code, per_channel_view, rounded
from fxquant.numerics.division import Rounding, divide_by_number, reciprocal

# torch's per-channel kernels cast the code to int64; what does not fit becomes its lowest value.
_INT64_END = 2.0**63


class Codes(NamedTuple):
    """Clamped codes as floats, and where they were clamped."""

    code: Tensor
    below: Tensor
    above: Tensor

    def inside(self) -> Tensor:
        """Where the gradient passes."""
        return ~(self.below | self.above)

    def slope(self, low: Tensor | float, high: Tensor | float, inside: Tensor) -> Tensor:
        """One of three derivatives."""
        return torch.where(self.below, low, torch.where(self.above, high, inside))


def _clamped(code: Tensor, quant_min: int, quant_max: int) -> Codes:
    return Codes(clamp_code(code, quant_min, quant_max), ~(code >= quant_min), code > quant_max)


def _without_sign_of_zero(code: Tensor) -> Tensor:
    return torch.where(code == 0, 0.0, code)


def _widened(x: Tensor, *parameters: Tensor, axis: int | None = None) -> tuple[Tensor, ...]:
    """``x`` in the dtype of the arithmetic, and the parameters in the same, broadcastable against it."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    shaped = (p.reshape(()) if axis is None else per_channel_view(p, x.dim(), axis) for p in parameters)
    return wide, *(p.to(wide.dtype) for p in shaped)


def _sum_to(values: Tensor, parameter: Tensor, axis: int | None, factor: float | Tensor = 1.0) -> Tensor:
    """The gradient of a parameter from that of each element."""
    others = [d for d in range(values.dim()) if d != axis]
    # sum over an empty list of dimensions means all of them: a 1-D tensor per channel keeps its elements.
    total = values.sum(others) if others else values
    return (total * factor).reshape(parameter.shape).to(parameter.dtype)


def _affine_codes(
    wide: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> tuple[Codes, Tensor]:
    """The codes, and the rounded zero point: NaN is ``quant_min``."""
    point = clamp_code(zero_point.round(), quant_min, quant_max)
    point = _without_sign_of_zero(point)
    code = (wide / scale if rounding == "divide" else wide * reciprocal(scale)).round() + point
    if axis is not None and rounding == "reciprocal":
        code = torch.where(code < _INT64_END, code, -math.inf)
    return _clamped(code, quant_min, quant_max), point


def learnable_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Tensor:
    """``(clamp(round(x / scale) + z) − z) · scale`` with ``z = clamp(round(zero_point))``; torch's forward."""
    wide, scale, zero_point = _widened(x, scale, zero_point, axis=axis)
    codes, point = _affine_codes(wide, scale, zero_point, axis, quant_min, quant_max, rounding)
    steps = codes.code - point
    if axis is not None and rounding == "reciprocal" and x.dtype != torch.float32:
        steps, scale = steps.double(), scale.double()  # as fake_quantize_per_channel_affine, whose numbers these are
    return rounded(steps * scale, x.dtype)


def learnable_affine_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    rounding: Rounding,
    of_errors: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, scale, zero_point); without ``of_errors`` to the scale from what is clipped only (PACT)."""
    wide, wide_scale, wide_point = _widened(x, scale, zero_point, axis=axis)
    codes, point = _affine_codes(wide, wide_scale, wide_point, axis, quant_min, quant_max, rounding)
    inside, wide_grad = codes.inside(), grad.to(wide.dtype)
    error = (codes.code - point) * wide_scale - wide
    steps = error / wide_scale if rounding == "divide" else error * reciprocal(wide_scale)
    steps = steps if of_errors else torch.zeros_like(steps)
    to_scale = wide_grad * codes.slope(quant_min - point, quant_max - point, steps)
    to_point = wide_grad * torch.where(inside, 0.0, -wide_scale)
    return (
        grad * inside.to(grad.dtype),
        _sum_to(to_scale, scale, axis, grad_factor),
        _sum_to(to_point, zero_point, axis, grad_factor),
    )


def lsq_plus(x: Tensor, scale: Tensor, offset: Tensor, axis: int | None, quant_min: int, quant_max: int) -> Tensor:
    """``clamp(round((x − offset) / scale)) · scale + offset``."""
    wide, scale, offset = _widened(x, scale, offset, axis=axis)
    codes = _clamped(((wide - offset) / scale).round(), quant_min, quant_max)
    return (_without_sign_of_zero(codes.code) * scale + offset).to(x.dtype)


def lsq_plus_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, scale, offset)."""
    wide, wide_scale, wide_offset = _widened(x, scale, offset, axis=axis)
    steps = (wide - wide_offset) / wide_scale
    codes = _clamped(steps.round(), quant_min, quant_max)
    inside, wide_grad = codes.inside(), grad.to(wide.dtype)
    to_scale = wide_grad * codes.slope(quant_min, quant_max, codes.code - steps)
    to_offset = wide_grad * (~inside).to(wide.dtype)
    return (
        grad * inside.to(grad.dtype),
        _sum_to(to_scale, scale, axis, grad_factor),
        _sum_to(to_offset, offset, axis, grad_factor),
    )


def pact(x: Tensor, alpha: Tensor, num_bits: int, signed: bool) -> Tensor:
    """``clamp(round(x / s)) · s`` with ``s = alpha / n``, where n is the highest code and 0 or −n the lowest."""
    wide, alpha = _widened(x, alpha)
    highest = 2 ** (num_bits - signed) - 1
    scale = divide_by_number(alpha, highest)
    code = clamp_code((wide / scale).round(), -highest if signed else 0, highest)
    return (_without_sign_of_zero(code) * scale).to(x.dtype)


def pact_backward(grad: Tensor, x: Tensor, alpha: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Gradients of (x, alpha): those of ``clamp(x, 0 or −alpha, alpha)``, its upper end counted as clamped."""
    wide, limit = _widened(x, alpha)
    below = ~(wide > -limit) if signed else ~(wide >= 0)
    codes = Codes(wide, below, wide >= limit)
    slope = codes.slope(-1.0 if signed else 0.0, 1.0, torch.zeros_like(wide))
    return grad * codes.inside().to(grad.dtype), _sum_to(grad.to(wide.dtype) * slope, alpha, None)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2 ** exponent`` of whole float32 or float64 exponents, exact: the nearest normal number, NaN for NaN."""
    double = exponent.dtype == torch.float64
    mantissa_bits, bias, dtype = (52, 1023, torch.int64) if double else (23, 127, torch.int32)
    whole = torch.where(torch.isnan(exponent), 0.0, exponent).clamp(1 - bias, bias).to(dtype)
    return torch.where(torch.isnan(exponent), exponent, ((whole + bias) << mantissa_bits).view(exponent.dtype))


def _tqt_scale(log2_threshold: Tensor, num_bits: int, signed: bool) -> tuple[Tensor, int, int]:
    """(scale, quant_min, quant_max)."""
    codes = 2 ** (num_bits - signed)
    return power_of_two(log2_threshold.ceil() - (num_bits - signed)), -codes if signed else 0, codes - 1


def tqt(x: Tensor, log2_threshold: Tensor, num_bits: int, signed: bool) -> Tensor:
    """``clamp(round(x / s)) · s`` with ``s = 2^ceil(log2_threshold) / 2^(num_bits − signed)``."""
    wide, exponent = _widened(x, log2_threshold)
    scale, quant_min, quant_max = _tqt_scale(exponent, num_bits, signed)
    code = clamp_code((wide / scale).round(), quant_min, quant_max)
    return (_without_sign_of_zero(code) * scale).to(x.dtype)


def tqt_backward(grad: Tensor, x: Tensor, log2_threshold: Tensor, num_bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Gradients of (x, log2_threshold)."""
    wide, exponent = _widened(x, log2_threshold)
    scale, quant_min, quant_max = _tqt_scale(exponent, num_bits, signed)
    steps = wide / scale
    codes = _clamped(steps.round(), quant_min, quant_max)
    to_scale = grad.to(wide.dtype) * codes.slope(quant_min, quant_max, codes.code - steps)
    return grad * codes.inside().to(grad.dtype), _sum_to(to_scale, log2_threshold, None, scale * math.log(2.0))
