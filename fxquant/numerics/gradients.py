"""Products of a float gradient and of codes, on integer units: the gradient becomes codes of 8 bits for the product.

::

    Σ g · (code − zero) · scale   ≈   Σ round(g / step) · (code − zero) · (step · scale)       step = max|g| / 127

with a step for each row or column of the gradient that is summed, so that sums stay integers. A scale for each of what
is summed over, as a weight's channels in the gradient of a layer's input, is multiplied into the gradient first.

Of what is summed over, as the tokens in the gradient of a weight, the few with the largest gradients may stay float:

::

    Σ_S   →   Σ_{S − O} of codes + Σ_O of floats                                step = max|g| / 127 over S − O
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.stochastic import round_by_chance

WORDS = 2**24  # random words are below it, which float32 holds
_LARGEST = 127  # as large a negative code is allowed as a positive one
_BLOCK = 32  # rows that are reduced together, which stay in cache


def chance(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(a[m] + b[n]) mod 1``: a multiple of 2^−24 in [0, 1) for each element [m, n] of ``shape``.

    ``words`` holds M + N independent numbers (`fxquant.ops.rounding_words`), a first. Each element is uniform, those of
    one row or one column are independent, and so are any two: the errors of one sum along either dimension are those of
    numbers drawn one by one, at an addition each. A counter-based generator takes forty operations, longer than the
    integer product itself.
    """
    first, second = words[: shape[0]], words[shape[0] :]
    mixed = (first.view(-1, 1) + second.view(1, -1)) & (WORDS - 1)
    return mixed.to(torch.float32) * (1.0 / WORDS)


def step_of(grad: Tensor, dim: int) -> Tensor:
    """``max|g| / 127`` along ``dim``, which stays with one element; not 0, and not finite where ``g`` is not."""
    large = grad.abs()
    if _has_blocks(grad, dim):
        large = large.view(-1, _BLOCK, grad.shape[1]).amax(1)
    return (large.amax(dim, keepdim=True) * (1.0 / _LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)


def _has_blocks(values: Tensor, dim: int) -> bool:
    size = values.shape[dim]
    return dim == 0 and isinstance(size, int) and size > _BLOCK and size % _BLOCK == 0


def codes_of(grad: Tensor, step: Tensor, words: Tensor | None) -> Tensor:
    """``g / step`` as int8: to the nearest, or with ``words`` up or down by chance, g on average."""
    steps = grad * step.reciprocal()
    whole = steps.round() if words is None else round_by_chance(steps, chance(words, tuple(grad.shape)))
    return whole.clamp(-_LARGEST, _LARGEST).to(torch.int32).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a product of a gradient and codes [S, K] is taken.

    Attributes:
        columns: the gradient lies in memory as [S, R], else as [R, S].
        turned: the result is to be [K, R], else [R, K].
        scale_dim, zero_dim: the dimension of the codes that scale and zero point have an element for; None for one.
        dtype: of the result.
        outliers: how many of S stay float: those with the largest gradients.
    """

    columns: bool
    turned: bool
    scale_dim: int | None
    zero_dim: int | None
    dtype: torch.dtype
    outliers: int = 0


def product(grad: Tensor, code: Tensor, scale: Tensor, zero: Tensor | None, words: Tensor | None, form: Form) -> Tensor:
    """``Σ_s grad[r, s] · (code[s, k] − zero) · scale``, of the gradient's codes; sums are exact in int32.

    ``code`` is int8, or uint8 where the gradient lies in columns: torch multiplies uint8 from the left only.
    """
    summed = 0 if form.columns else 1
    values = grad.to(torch.float32)
    if form.scale_dim == 0:
        values = values * scale.to(torch.float32).unsqueeze(1 - summed)
    largest, rest = _set_apart(values, summed, form.outliers)
    step = step_of(rest, summed)
    codes = codes_of(rest, step, words)
    total = torch._int_mm(code.t(), codes) if form.columns else torch._int_mm(codes, code)
    if zero is not None:
        total = total - _offsets(codes, zero.to(torch.int32), summed, form.zero_dim)
    factor = step if form.scale_dim == 0 else step * _along(scale.to(torch.float32), summed)
    result = total.to(torch.float32) * factor
    if largest is not None:
        floats = _dequantized(code.index_select(0, largest), largest, scale, zero, form)
        apart = values.index_select(summed, largest)
        result = result + (torch.mm(floats.t(), apart) if form.columns else torch.mm(apart, floats))
    value = result.to(form.dtype)
    return value if form.columns == form.turned else value.t().contiguous()


def _set_apart(values: Tensor, summed: int, count: int) -> tuple[Tensor | None, Tensor]:
    """Which ``count`` of what is summed have the largest gradients, and the gradient with zeros there."""
    if not count:
        return None, values
    largest = values.abs().amax(1 - summed).topk(count).indices
    kept = torch.ones(values.shape[summed], dtype=torch.bool, device=values.device).index_fill(0, largest, False)
    return largest, torch.where(kept.unsqueeze(1 - summed), values, 0.0)


def _dequantized(code: Tensor, which: Tensor, scale: Tensor, zero: Tensor | None, form: Form) -> Tensor:
    """``(code − zero) · scale`` of some of the codes, without a scale that the gradient has already."""
    values = code.to(torch.float32)
    if zero is not None:
        point = zero.to(torch.float32)
        values = values - (point.index_select(0, which).unsqueeze(1) if form.zero_dim == 0 else point.view(1, -1))
    return values if form.scale_dim == 0 else values * scale.to(torch.float32).view(1, -1)


def _offsets(codes: Tensor, zero: Tensor, summed: int, zero_dim: int | None) -> Tensor:
    """``Σ_s code · zero``, as it is taken off the sums."""
    if zero_dim == 0:
        return (codes.to(torch.int32) * zero.unsqueeze(1 - summed)).sum(summed, keepdim=True, dtype=torch.int32)
    if _has_blocks(codes, summed):
        codes = codes.view(-1, _BLOCK, codes.shape[1]).sum(1, dtype=torch.int32)
    return codes.sum(summed, keepdim=True, dtype=torch.int32) * _along(zero, summed)


def _along(each: Tensor, summed: int) -> Tensor:
    """One number, or one for each of K, as it broadcasts against the sums."""
    return each.view(1, -1) if summed else each.view(-1, 1)
