"""Codes in real integer dtypes, two 4-bit codes in a byte, and products of codes.

The codes are those of `affine`, so ``dequantize(quantize(x))`` has the bits of fake-quantize; a float code becomes an
integer only here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.numerics.affine import codes_per_channel, codes_per_tensor, dequantize, per_channel_view, rounded
from fxquant.numerics.division import Rounding


def quantize_per_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    rounding: Rounding,
) -> Tensor:
    """``clamp(round(x / scale) + zero_point)`` as integers; only the integer part of a floating zero point counts."""
    point = None if zero_point is None else zero_point.to(torch.int32)
    code = codes_per_tensor(x, scale, point, quant_min, quant_max, rounding)
    return _to_integer(code, quant_min, quant_max, dtype)


def quantize_per_channel(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    rounding: Rounding,
) -> Tensor:
    """`quantize_per_tensor` with one scale and zero point per slice of ``axis``."""
    scale, zero_point = (per_channel_view(v, x.dim(), axis) for v in (scale, zero_point))
    code = codes_per_channel(x, scale, zero_point, quant_min, quant_max, rounding)
    return _to_integer(code, quant_min, quant_max, dtype)


def _to_integer(code: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    if dtype is torch.int32:
        # A float holds no 2³¹ − 1, only 2³¹: clamped as floats, such a code can still be one too large.
        return code.to(torch.int64).clamp(quant_min, quant_max).to(dtype)
    return code.to(torch.int32).to(dtype)


def dequantize_per_tensor(code: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(code − zero_point) · scale`` in float32, then in ``dtype``."""
    point = None if zero_point is None else zero_point.to(torch.int32)
    return dequantize(code, scale.to(torch.float32), point).to(dtype)


def dequantize_per_channel(code: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """The same per slice of ``axis``, in double for float64 and for a floating zero point, which keeps its fraction."""
    wide = torch.float64 if dtype == torch.float64 or zero_point.is_floating_point() else torch.float32
    scale, zero_point = (per_channel_view(v, code.dim(), axis) for v in (scale.to(wide), zero_point))
    return rounded(dequantize(code.to(wide), scale, zero_point), dtype)


def dequantize_backward(
    grad: Tensor, code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> dict[str, Tensor]:
    """``dscale = Σ dy · (code − zero_point)`` and, for a floating zero point, ``dzero_point = −Σ dy · scale``.

    Summed in double, so that the order of summation, which compilers change, all but never shows in the result.
    """
    wide = grad.to(torch.float64)
    point = zero_point.to(torch.int32) if axis is None else per_channel_view(zero_point, code.dim(), axis)
    others = [d for d in range(code.dim()) if d != axis]

    def reduced(values: Tensor) -> Tensor:
        # A sum over no dimension would mean all of them.
        return values.sum(others) if others else values

    dscale = reduced(wide * (code.to(torch.float64) - point.to(torch.float64)))
    found = {"scale": dscale.reshape(scale.shape).to(scale.dtype)}
    if zero_point.is_floating_point() and axis is not None:
        found["zero_point"] = (-reduced(wide) * scale).to(zero_point.dtype)
    return found


def matmul(
    lhs: Tensor,
    rhs: Tensor,
    lhs_scale: Tensor,
    rhs_scale: Tensor,
    *,
    lhs_zero: Tensor | None = None,
    rhs_zero: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(Σ_k (lhs[m,k] − lhs_zero) · (rhs[k,n] − rhs_zero)) · (lhs_scale · rhs_scale) + bias``, as integer kernels do.

    The sum is exact in int32, becomes a float32 once, and takes one product with the scales' product and one sum with
    the bias, both in float32: ONNX Runtime's MatMulInteger, Cast, Mul, Add. ``lhs`` is [M, K], int8 or uint8, ``rhs``
    [K, N], int8; the scale and zero point of ``lhs`` have 1 or M elements, those of ``rhs`` 1 or N. A zero point left
    out is 0.
    """
    total = torch._int_mm(lhs, rhs)  # without an underscore nothing in torch multiplies integers fast
    if lhs_zero is not None:
        total = total - lhs_zero.to(torch.int32).view(-1, 1) * rhs.sum(0, dtype=torch.int32).view(1, -1)
    if rhs_zero is not None:
        point = rhs_zero.to(torch.int32).view(1, -1)
        total = total - lhs.sum(1, keepdim=True, dtype=torch.int32) * point
        if lhs_zero is not None:
            total = total + lhs_zero.to(torch.int32).view(-1, 1) * (point * lhs.shape[1])
    return rescale(total, lhs_scale.view(-1, 1), rhs_scale.view(1, -1), bias, dtype)


def rescale(total: Tensor, lhs_scale: Tensor, rhs_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``total · (lhs_scale · rhs_scale) + bias`` in float32, then in ``dtype``."""
    value = total.to(torch.float32) * (lhs_scale.to(torch.float32) * rhs_scale.to(torch.float32))
    return (value if bias is None else value + bias.to(torch.float32)).to(dtype)


def pack_nibbles(code: Tensor) -> Tensor:
    """``[…, n]`` codes as ``[…, ⌈n/2⌉]`` bytes, the first of a pair in the low four bits, 0 after an odd end."""
    nibble = code.to(torch.uint8) & 15
    # The odd half of a padded copy is as long as the even half of the original, whether n is even or odd.
    return nibble[..., 0::2] | (functional.pad(nibble, (0, 1))[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, length: int, signed: bool) -> Tensor:
    """The first ``length`` codes of each row: int8 with the sign bit extended, or uint8."""
    nibble = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :length]
    return (nibble ^ 8).to(torch.int8) - 8 if signed else nibble.contiguous()
