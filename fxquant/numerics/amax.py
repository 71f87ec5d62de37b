"""Quantizers whose range is one number, the largest magnitude ``amax``: integer codes, small floats, min/max pairs.

``B = 2^(num_bits − 1 + unsigned) − 1`` is the highest code, the lowest 0 (unsigned), −B (narrow) or −B − 1::

    s    = B / amax                         one division, also where amax is a broadcast tensor
    code = clamp(round_half_even(x · s), lowest, B)
    y    = code / s
    dx   = dy · [|x| ≤ amax]                damax = Σ dy · (code − [|x| ≤ amax] · x · s) / B

An ``amax`` of at most 2⁻²⁴ holds nothing worth a code: its elements give 0, whatever x is. Elsewhere NaN stays NaN.
Arithmetic is float32 (float64 for float64 input), with one rounding to the input's dtype at the end. No divisor
is a number: torch would multiply by its reciprocal, with a second rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.division import divide_by_number
from fxquant.numerics.floating import round_to_float
from fxquant.numerics.formats import FloatFormat

EPSILON = 2.0**-24
"""An amax of at most this counts as 0."""

_HALF = FloatFormat("float16", 5, 10, 15, 65504.0, has_infinity=True, has_nan=True)


def code_range(num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[int, int]:
    """Lowest and highest code."""
    bound = 2 ** (num_bits - 1 + unsigned) - 1
    return (0 if unsigned else -bound - (not narrow_range)), bound


def widen(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def aligned(amax: Tensor, wide: Tensor) -> Tensor:
    """``amax`` in the dtype of ``wide``; one element has no dimensions, so that it never adds any."""
    return (amax.reshape(()) if amax.numel() == 1 else amax).to(wide.dtype)


def _scale(amax: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """``bound / amax``, and where it is 1 instead because amax counts as 0."""
    nothing = amax <= EPSILON
    return torch.where(nothing, 1.0, torch.full_like(amax, bound) / amax), nothing


def _codes(wide: Tensor, scale: Tensor, nothing: Tensor, lowest: int, bound: int) -> Tensor:
    code = (wide * scale).round()
    # clamp may turn −0 into +0 at a limit of 0, or not; a comparison always keeps it.
    code = torch.where(code < 0, 0.0, code) if lowest == 0 else code.clamp(min=lowest)
    return torch.where(nothing, 0.0, code.clamp(max=bound))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 ``value`` as ``dtype`` would hold it, still float32; float64 stays.

    Not a cast there and back, because Inductor drops the narrow dtype between two wide ones.
    """
    if dtype == torch.float16:
        return round_to_float(value, _HALF, saturate=False)
    if dtype != torch.bfloat16:
        return value
    bits = value.view(torch.int32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
    return torch.where(value.isnan(), value, rounded.view(torch.float32))


def tensor_quant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[Tensor, Tensor]:
    """Integer-valued codes in x's dtype, and the scale that divides them, shaped like amax: 1 where amax is 0."""
    wide = widen(x)
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    scale, nothing = _scale(aligned(amax, wide), bound)
    code = _codes(wide, scale, nothing, lowest, bound)
    return code.to(x.dtype), scale.reshape(amax.shape).to(x.dtype)


def fake_tensor_quant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """``code / s`` with one rounding to x's dtype."""
    wide = widen(x)
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    scale, nothing = _scale(aligned(amax, wide), bound)
    return (_codes(wide, scale, nothing, lowest, bound) / scale).to(x.dtype)


def legacy_fake_tensor_quant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """``code / s`` of a code and a scale that were rounded to x's dtype before."""
    wide = widen(x)
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    scale, nothing = _scale(aligned(amax, wide), bound)
    code = _codes(wide, scale, nothing, lowest, bound)
    return (_stored(code, x.dtype) / _stored(scale, x.dtype)).to(x.dtype)


def clipped(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    """``dx``: the gradient where |x| ≤ amax, 0 elsewhere and for NaN."""
    wide = widen(x)
    return torch.where(wide.abs() <= aligned(amax, wide), grad, 0.0)


def _amax_gradient(grad: Tensor, x: Tensor, code: Tensor, scaled: Tensor, amax: Tensor, bound: float) -> Tensor:
    """``damax`` in the dtype and shape of ``amax``.

    Where amax counts as 0 it is that of clipping everything, ``sign(x)``: a range that collapsed can grow again.
    """
    wide, reach = widen(x), aligned(amax, code)
    inside = torch.where(wide.abs() <= reach, scaled, 0.0)
    slope = torch.where(reach <= EPSILON, wide.sign(), divide_by_number(code - inside, bound))
    total = (grad.to(code.dtype) * slope).sum_to_size(reach.shape)
    return total.reshape(amax.shape).to(amax.dtype)


def fake_tensor_quant_amax_gradient(
    grad: Tensor, x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> Tensor:
    """``damax`` of `fake_tensor_quant`, summed over what an element of amax stands for."""
    x = x.clamp(min=0.0) if unsigned else x  # below 0 the code is 0 for any amax
    wide = widen(x)
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    scale, nothing = _scale(aligned(amax, wide), bound)
    code = _codes(wide, scale, nothing, lowest, bound)
    return _amax_gradient(grad, x, code, wide * scale, amax, bound)


def fake_affine_tensor_quant(x: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    """``(clamp(round(x/step) − zero) + zero) · step``, with ``step`` and ``zero`` from the range; 0 if it is empty."""
    wide = widen(x)
    low, high = aligned(low, wide), aligned(high, wide)
    half = 2 ** (num_bits - 1)
    width = high - low
    step = divide_by_number(width, 2**num_bits - 1)
    zero = (low / step).round() + half
    code = ((wide / step).round() - zero).clamp(-half, half - 1)
    return torch.where(high > low, (code + zero) * step, 0.0).to(x.dtype)


def between(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The gradient where low ≤ x ≤ high, 0 elsewhere, for NaN and for an empty range."""
    wide = widen(x)
    low, high = aligned(low, wide), aligned(high, wide)
    return torch.where((wide >= low) & (wide <= high) & (high > low), grad, 0.0)


def effective_amax(amax: Tensor) -> Tensor:
    """What `scaled_float` takes: 1 for an amax that counts as 0."""
    return torch.where(amax <= EPSILON, 1.0, amax)


def scaled_float(x: Tensor, amax: Tensor | None, target: FloatFormat) -> Tensor:
    """``target(x · (max/amax)) · (amax/max)``, saturating; a bare cast without amax."""
    wide = widen(x)
    if amax is None:
        return round_to_float(wide, target).to(x.dtype)
    reach = effective_amax(aligned(amax, wide))
    scale = torch.full_like(reach, target.max) / reach
    return (round_to_float(wide * scale, target) * divide_by_number(reach, target.max)).to(x.dtype)


def scaled_float_clipped(grad: Tensor, x: Tensor, amax: Tensor | None, target: FloatFormat) -> Tensor:
    """``dx`` of `scaled_float`: clipped at the amax that it took, the format's largest value for a bare cast."""
    if amax is None:
        return torch.where(x.abs() <= target.max, grad, 0.0)
    return clipped(grad, x, effective_amax(aligned(amax, widen(x))))


def scaled_float_amax_gradient(grad: Tensor, x: Tensor, amax: Tensor, target: FloatFormat) -> Tensor:
    """``damax`` of `scaled_float`: the integer one with the rounded float in the code's place."""
    wide = widen(x)
    reach = effective_amax(aligned(amax, wide))
    scaled = wide * (torch.full_like(reach, target.max) / reach)
    return _amax_gradient(grad, x, round_to_float(scaled, target), scaled, amax, target.max)
