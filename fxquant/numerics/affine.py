"""Affine quantize and dequantize.

Eager kernels, the lowering for Inductor, gradients and export all call these, so they agree bit for bit::

    code  = round_half_even(x · (1/scale)) + zero_point          rounding="reciprocal" (torch)
    code  = round_half_even(x / scale) + zero_point              rounding="divide"     (ONNX QuantizeLinear)
    code  = round_half_even(x · (1/scale) + zero_point)          "reciprocal" with a floating zero point per channel
    y     = (clamp(code, quant_min, quant_max) − zero_point) · scale
    dx    = dy · [quant_min ≤ code ≤ quant_max]                  clipped straight-through estimator

Arithmetic is float32 (float64 for float64 input), with one rounding to the input's dtype at the end.
``scale`` and ``zero_point`` arrive broadcastable against ``x``: see `per_channel_view`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.numerics.division import Rounding, reciprocal

# torch's per-channel kernels cast the code to int64 before they clamp; what does not fit becomes INT64_MIN.
_INT64_END = 2.0**63


def per_channel_view(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """``[C]`` as ``[1, …, C, …, 1]`` with C at ``axis`` of ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


def code_before_clamp(x: Tensor, scale: Tensor, zero_point: Tensor | None, rounding: Rounding) -> Tensor:
    """The rounded code, in float and not yet clamped; NaN where x is NaN. No zero point: 0, known beforehand."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    scale = scale.to(torch.float32)
    steps = wide / scale if rounding == "divide" else wide * reciprocal(scale)
    # Adding the zero point, even 0, also turns −0 into +0: torch's integer codes have no sign of zero.
    if zero_point is None:  # compilers drop the addition of a 0 that they see
        code = steps.round()
        return torch.where(code == 0, 0.0, code)
    if rounding == "reciprocal" and zero_point.is_floating_point():
        return _float_code(wide, reciprocal(scale), zero_point).round() + 0.0
    return steps.round() + zero_point.to(torch.float32)


def _float_code(wide: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    """``wide · inverse + zero_point`` in float32, rounded as often as torch's per-channel kernels round.

    In double a product of two float32 is exact, and no compiler can contract it with the sum after a conversion.
    """
    product, point = wide.double() * inverse, zero_point.double()
    if wide.dtype == torch.float64:
        return (product + point).to(torch.float32)
    if zero_point.dtype == torch.float16:  # with a float32 product, unlike a float32 zero point
        return (product.to(torch.float32).double() + point).to(torch.float32)
    # A fused multiply-add. Double can round the sum onto a tie of float32; rounded to odd, it keeps its side.
    total = product + point
    part = total - product
    error = (product - (total - part)) + (point - part)
    bits = total.view(torch.int64)
    to_odd = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    inexact = (error > 0) | (error < 0)
    return torch.where(inexact & (bits & 1 == 0), to_odd, bits).view(torch.float64).to(torch.float32)


def clamp_code(code: Tensor, quant_min: int, quant_max: int, *, wrap: bool = False) -> Tensor:
    """Into the range; NaN becomes ``quant_min``. ``wrap``: so does what int64 cannot hold."""
    if wrap and code.dtype == torch.float32:
        # Scaled so that what int64 cannot hold overflows, and becomes NaN: a quarter faster than a comparison.
        scaled = code * (2.0**128 / _INT64_END)
        code = code + (scaled - scaled)
    elif wrap:
        code = torch.where(code < _INT64_END, code, quant_min)
    # A comparison with NaN is false, so `where` needs no separate NaN test; after it a plain minimum is enough.
    # Vectorized by Inductor's C++, forward of 4M floats: this 1.4 ms, fmax and fmin 2.1 ms, two `where` 2.1 ms.
    return torch.where(code >= quant_min, code, quant_min).clamp(max=quant_max)


def clip_mask(code: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Where the gradient passes: the code before clamping lies in the range (NaN does not)."""
    return (code >= quant_min) & (code <= quant_max)


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``(code − zero_point) · scale``; code holds integers of any dtype."""
    wide = code if code.is_floating_point() else code.to(torch.float32)
    return (wide if zero_point is None else wide - zero_point.to(wide.dtype)) * scale


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``; a double becomes a half by way of float32, as CPUs cast it, where GPUs round once."""
    if value.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        value = value.to(torch.float32).clamp(max=math.inf)  # casts in a row would be one for Inductor of torch 2.11
    return value.to(dtype)


def _integer_part(zero_point: Tensor | None) -> Tensor | None:
    """What torch's per-tensor kernels take of a floating zero point."""
    return None if zero_point is None else zero_point.to(torch.int32)


def codes_per_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """The codes of one scale and zero point, clamped, as floats."""
    return clamp_code(code_before_clamp(x, scale, zero_point, rounding), quant_min, quant_max)


def codes_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """The same with ``scale`` and ``zero_point`` as `per_channel_view` gives them.

    With "reciprocal", codes beyond int64 wrap to ``quant_min`` as torch's.
    """
    code = code_before_clamp(x, scale, zero_point, rounding)
    return clamp_code(code, quant_min, quant_max, wrap=rounding == "reciprocal")


def fake_quantize_per_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """One scale for the tensor. The product is float32 even for float64 input, as in torch."""
    zero_point = _integer_part(zero_point)
    code = codes_per_tensor(x, scale, zero_point, quant_min, quant_max, rounding)
    return dequantize(code.to(torch.float32), scale, zero_point).to(x.dtype)


def fake_quantize_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """One scale per slice of ``axis``.

    torch takes the product of "reciprocal" in double, which shows only where a float32 product is rounded twice.
    """
    scale, zero_point = (per_channel_view(v, x.dim(), axis) for v in (scale, zero_point))
    code = codes_per_channel(x, scale, zero_point, quant_min, quant_max, rounding)
    if rounding == "reciprocal" and (x.dtype != torch.float32 or zero_point.is_floating_point()):
        code, scale, zero_point = code.double(), scale.double(), zero_point.double()
    return rounded(dequantize(code, scale, zero_point), x.dtype)


def clip_mask_per_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """Where the gradient of `fake_quantize_per_tensor` passes."""
    return clip_mask(code_before_clamp(x, scale, _integer_part(zero_point), rounding), quant_min, quant_max)


def clip_mask_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    """Where the gradient of `fake_quantize_per_channel` passes."""
    scale, zero_point = (per_channel_view(v, x.dim(), axis) for v in (scale, zero_point))
    return clip_mask(code_before_clamp(x, scale, zero_point, rounding), quant_min, quant_max)


def fake_quantize_per_tensor_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Tensor:
    """``grad · mask``: a product, not a select, so inf · 0 is NaN as in torch."""
    return grad * clip_mask_per_tensor(x, scale, zero_point, quant_min, quant_max, rounding).to(grad.dtype)


def fake_quantize_per_channel_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Tensor:
    """`fake_quantize_per_tensor_backward` with one scale per slice of ``axis``."""
    return grad * clip_mask_per_channel(x, scale, zero_point, axis, quant_min, quant_max, rounding).to(grad.dtype)
