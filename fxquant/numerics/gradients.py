"""Products of a float gradient and of codes, on integer units: the gradient becomes codes of 8 bits for the product.

::

    Σ g · (code − zero) · scale   ≈   Σ round(g / step) · (code − zero) · (step · scale)       step = max|g| / 127

with a step for each row or column of the gradient that is summed, so that sums stay integers. A scale for each of what
is summed over, as a weight's channels in the gradient of a layer's input, is multiplied into the gradient first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.stochastic import round_by_chance

ROUNDS = 6  # of mixing, each with a key of 16 bits; with 4, neighbours are correlated, with 5 they are not seen to be
_MULTIPLIER = 0x72ED  # odd and below 2^15, so that its products with 16 bits are below 2^31
_LOW = 0xFFFF
_LARGEST = 127  # as large a negative code is allowed as a positive one
_BLOCK = 32  # rows whose extremes are taken together, which stay in cache


def chance(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A multiple of 2^−24 in [0, 1) for each element of ``shape``, from its row-major position and ``keys``.

    Philox with two words of 16 bits, `ROUNDS` rounds and a key of its own for each (`rounding_keys`): that of
    `fxquant.numerics.stochastic` in words that CPUs multiply 16 at a time.
    """
    index = torch.arange(math.prod(shape), dtype=torch.int32, device=keys.device).view(shape)
    left, right = index & _LOW, (index >> 16) & _LOW
    for turn in range(ROUNDS):
        mixed = left * _MULTIPLIER
        left, right = (mixed >> 16) ^ right ^ keys[turn], mixed & _LOW
    return (left * 256 + (right >> 8)).to(torch.float32) * 2.0**-24


def step_of(grad: Tensor, dim: int) -> Tensor:
    """``max|g| / 127`` along ``dim``, which stays with one element; not 0, and not finite where ``g`` is not."""
    size, large = grad.shape[dim], grad.abs()
    if dim == 0 and isinstance(size, int) and size > _BLOCK and size % _BLOCK == 0:
        large = large.view(size // _BLOCK, _BLOCK, *grad.shape[1:]).amax(1)
    return (large.amax(dim, keepdim=True) * (1.0 / _LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)


def codes_of(grad: Tensor, step: Tensor, keys: Tensor | None) -> Tensor:
    """``g / step`` as int8: to the nearest, or with ``keys`` up or down by chance, g on average."""
    steps = grad * step.reciprocal()
    whole = steps.round() if keys is None else round_by_chance(steps, chance(keys, tuple(grad.shape)))
    return whole.clamp(-_LARGEST, _LARGEST).to(torch.int32).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a product of a gradient and codes [S, K] is taken.

    Attributes:
        columns: the gradient lies in memory as [S, R], else as [R, S].
        turned: the result is to be [K, R], else [R, K].
        scale_dim, zero_dim: the dimension of the codes that scale and zero point have an element for; None for one.
        dtype: of the result.
    """

    columns: bool
    turned: bool
    scale_dim: int | None
    zero_dim: int | None
    dtype: torch.dtype


def product(
    grad: Tensor, code: Tensor, scale: Tensor, zero: Tensor | None, keys: Tensor | None, form: Form
) -> Tensor:
    """``Σ_s grad[r, s] · (code[s, k] − zero) · scale``, of the gradient's codes; sums are exact in int32.

    ``code`` is int8, or uint8 where the gradient lies in columns: torch multiplies uint8 from the left only.
    """
    summed = 0 if form.columns else 1
    values = grad.to(torch.float32)
    if form.scale_dim == 0:
        values = values * scale.to(torch.float32).unsqueeze(1 - summed)
    step = step_of(values, summed)
    codes = codes_of(values, step, keys)
    total = torch._int_mm(code.t(), codes) if form.columns else torch._int_mm(codes, code)
    if zero is not None:
        total = total - _offsets(codes, zero.to(torch.int32), summed, form.zero_dim)
    factor = step if form.scale_dim == 0 else step * _along(scale.to(torch.float32), summed)
    value = (total.to(torch.float32) * factor).to(form.dtype)
    return value if form.columns == form.turned else value.t().contiguous()


def _offsets(codes: Tensor, zero: Tensor, summed: int, zero_dim: int | None) -> Tensor:
    """``Σ_s code · zero``, as it is taken off the sums."""
    if zero_dim == 0:
        return (codes.to(torch.int32) * zero.unsqueeze(1 - summed)).sum(summed, keepdim=True, dtype=torch.int32)
    return codes.sum(summed, keepdim=True, dtype=torch.int32) * _along(zero, summed)


def _along(each: Tensor, summed: int) -> Tensor:
    """One number, or one for each of K, as it broadcasts against the sums."""
    return each.view(1, -1) if summed else each.view(-1, 1)
