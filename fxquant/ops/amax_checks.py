"""What the quantizers of `fxquant.ops.amax` refuse: static arguments always, values where a look is free."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import amax as numerics
from fxquant.numerics.formats import float_format
from fxquant.ops.checks import can_read, check_floating

_MAX_BITS = 16
_HALF_MAX = 65504.0
UNSIGNED = "Negative values encountered in unsigned quantization."


def _check_bits(num_bits: int, unsigned: bool = True) -> None:
    least = 1 if unsigned else 2  # one signed bit has no positive code
    if not least <= num_bits <= _MAX_BITS:
        kind = "unsigned" if unsigned else "signed"
        raise InvalidArgument(f"num_bits must be from {least} to {_MAX_BITS} for {kind} codes: got {num_bits}.")


def _check_range_tensor(name: str, value: Tensor, x: Tensor) -> None:
    """Floating, on the input's device, and broadcastable to it without making it larger."""
    check_floating(name, value)
    if value.device != x.device:
        raise InvalidArgument(f"{name} must be on the input's device, {x.device}: got {value.device}. Move it there.")
    if value.numel() == 1:
        return
    paired = list(zip(reversed(value.shape), reversed(x.shape), strict=False))
    if value.dim() > x.dim() or not all(mine == 1 or mine == theirs for mine, theirs in paired):
        raise InvalidArgument(
            f"{name} must broadcast to the input's shape {tuple(x.shape)}: got {tuple(value.shape)}. "
            f"Give one element, or size 1 in each dimension that shares a range."
        )


def check_static(input: Tensor, amax: Tensor, num_bits: int, unsigned: bool) -> None:
    """What shapes, dtypes and numbers of an integer quantizer show."""
    check_floating("input", input)
    _check_bits(num_bits, unsigned)
    _check_range_tensor("amax", amax, input)


def _check_amax(amax: Tensor, *, negative: bool = False) -> None:
    if not can_read(amax):
        return
    allowed = amax.isfinite() if negative else amax.isfinite() & (amax >= 0)
    if not allowed.all():
        value = amax[~allowed].reshape(-1)[0].item()
        if value < 0 and value != -float("inf"):
            raise InvalidArgument(f"Negative values in amax: amax must be at least 0, got {value}.")
        raise InvalidArgument(f"amax must be finite: got {value}. Look for NaN or inf in the data that it came from.")


def check_values(
    input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> None:
    """As `check_static`; and the values of both tensors."""
    check_static(input, amax, num_bits, unsigned)
    if unsigned and can_read(input) and (input < 0).any():
        raise TypeError(UNSIGNED)
    _check_amax(amax)


def check_learnable_values(
    input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> None:
    """As `check_values`; but an optimizer may step amax below 0, which its gradient then undoes."""
    check_static(input, amax, num_bits, unsigned)
    if unsigned and can_read(input) and (input < 0).any():
        raise TypeError(UNSIGNED)
    _check_amax(amax, negative=True)


def check_scale(
    input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> None:
    """As `check_values`; and the scale, which is stored in the input's dtype, fits a half."""
    check_values(input, amax, num_bits, unsigned, narrow_range)
    if input.dtype != torch.float16 or not can_read(amax):
        return
    _, bound = numerics.code_range(num_bits, unsigned, narrow_range)
    wide = amax.to(torch.float32)
    small = wide[(wide > numerics.EPSILON) & (wide * _HALF_MAX < bound)]
    if small.numel():
        raise InvalidArgument(
            f"amax must be at least {bound / _HALF_MAX:.3g} for float16 input: got {small.min().item()}, whose scale "
            f"is above {_HALF_MAX:.0f}, the largest float16. Use float32."
        )


def check_affine(input: Tensor, min: Tensor, max: Tensor, num_bits: int) -> None:
    """What shapes, dtypes and numbers of a quantizer between two ends show."""
    check_floating("input", input)
    _check_bits(num_bits)
    _check_range_tensor("min", min, input)
    _check_range_tensor("max", max, input)


def check_affine_values(input: Tensor, min: Tensor, max: Tensor, num_bits: int = 8) -> None:
    """As `check_affine`; and that the range has a width."""
    check_affine(input, min, max, num_bits)
    if not (can_read(min) and can_read(max)):
        return
    low, high = torch.broadcast_tensors(min.detach(), max.detach())
    bad = ~((low < high) & (high - low).isfinite())
    if bad.any():
        pair = f"min={low[bad].reshape(-1)[0].item()} and max={high[bad].reshape(-1)[0].item()}"
        raise InvalidArgument(f"max must be above min, both finite: got {pair}. Give a range that has a width.")


def check_float(input: Tensor, amax: Tensor | None, E: int, M: int) -> None:
    """What shapes, dtypes and the format of a float quantizer show."""
    check_floating("input", input)
    float_format((E, M))
    if amax is not None:
        _check_range_tensor("amax", amax, input)


def check_float_values(input: Tensor, amax: Tensor | None, E: int = 4, M: int = 3) -> None:
    """As `check_float`; and the values of amax."""
    check_float(input, amax, E, M)
    if amax is not None:
        _check_amax(amax)


def check_learnable_float_values(input: Tensor, amax: Tensor, E: int = 4, M: int = 3) -> None:
    """As `check_float_values`; but for the sign of amax."""
    check_float(input, amax, E, M)
    _check_amax(amax, negative=True)
