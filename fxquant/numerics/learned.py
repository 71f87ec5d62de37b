"""Trained ranges of sites: the scale and zero point of a parameter, and the parameter that a tensor starts with.

What is trained, by method; ``z`` is the zero point, ``p`` the parameter::

    lsq        p is the scale                            s = |p|
    lsq_plus   p is the scale, and an offset is trained  s = |p|,   z = clamp(round(−offset / s), quant_min, quant_max)
    pact       p is what values are clipped at           s = |p| / (quant_max − z)
    amax       the same                                  s = |p| / (quant_max − z)
    tqt        p is the log2 of that                     s = 2^ceil(p) / 2^bits(quant_max − z)

``|p|`` stands for ``max(|p|, floor)`` with a floor above 0, so that no step of an optimizer, however large, makes a
scale that is zero or negative; of a parameter at or above the floor it is the parameter itself, bit for bit.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxquant.numerics.affine import clamp_code, per_channel_view
from fxquant.numerics.division import divide_by_number
from fxquant.numerics.learnable import power_of_two

Method = Literal["lsq", "lsq_plus", "pact", "tqt", "amax"]
How = Literal["resolve", "extend", "follow"]
Init = Literal["mse", "max"]

# No parameter is this number by training: just below 0, and finite, so that averages of models stay finite.
UNSET = -torch.finfo(torch.float32).tiny
_HIGHEST = torch.finfo(torch.float32).max
_FOLLOWS = 0.1  # of a batch, in a calibration that follows them
_RATIO, _CANDIDATES = 0.93, 48  # of the extremes, down to 3 %: coarser than this costs error, finer shows none


class Grid(NamedTuple):
    """A way to train a scale, and the codes that it is for."""

    method: Method
    quant_min: int
    quant_max: int
    symmetric: bool
    floor: float

    @property
    def middle(self) -> int:
        """The zero point that mirrors: of symmetric formats, and of what has values of both signs in others."""
        return 0 if self.quant_min < 0 and self.symmetric else (self.quant_min + self.quant_max + 1) // 2

    @property
    def sided(self) -> bool:
        """Whether a reach from 0 is trained, so that the zero point lies in the middle or at the lowest code."""
        return self.method in ("pact", "tqt", "amax")


def magnitude(parameter: Tensor, floor: float) -> Tensor:
    """``|p|``, at least the floor and finite but for NaN."""
    return parameter.abs().clamp(floor, _HIGHEST)


def _codes_above(grid: Grid, point: Tensor | None) -> Tensor | int:
    return grid.quant_max - (grid.middle if point is None else point)


def scale_of(parameter: Tensor, point: Tensor | None, grid: Grid) -> Tensor:
    """The scale; ``point`` is the zero point where the format does not fix it, without effect on "lsq"."""
    if not grid.sided:
        return magnitude(parameter, grid.floor)
    above = _codes_above(grid, point)
    if grid.method == "tqt":
        return power_of_two(parameter.ceil() - _bits(above))
    reach = magnitude(parameter, grid.floor)
    return reach / above if isinstance(above, Tensor) else divide_by_number(reach, above)


def _bits(above: Tensor | int) -> Tensor | int:
    """The bits of this many codes above zero: 7 for 127, 8 for 255."""
    return (above + 1).log2().ceil() if isinstance(above, Tensor) else math.ceil(math.log2(above + 1))


def scale_backward(grad: Tensor, parameter: Tensor, point: Tensor | None, grid: Grid) -> Tensor:
    """The gradient of the parameter; through the floor as above it, so that a scale can leave it again."""
    if grid.method == "tqt":
        return grad * scale_of(parameter, point, grid) * math.log(2.0)
    towards = torch.where(parameter < 0, -grad, grad)
    if not grid.sided:
        return towards
    above = _codes_above(grid, point)
    return towards / above if isinstance(above, Tensor) else divide_by_number(towards, above)


def point_of(offset: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``clamp(round(−offset / scale))`` as floats, the code of 0; NaN counts as ``quant_min``."""
    code = clamp_code((-offset / scale).round(), quant_min, quant_max)
    return torch.where(code == 0, 0.0, code)


def point_backward(grad: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (offset, scale), straight through rounding and clamping."""
    return -grad / scale, grad * offset / (scale * scale)


# ---------------------------------------------------------------- what it starts with


def start(
    x: Tensor, parameter: Tensor, second: Tensor | None, grid: Grid, axis: int | None, init: Init, how: How
) -> tuple[Tensor, Tensor]:
    """The parameter, and the zero point or offset, after ``x`` was seen.

    "resolve" sets what is unset; "extend" and "follow" widen or move what is set by other tensors. Of zeros, or of
    non-finite values, nothing is set. ``second`` None: the zero point is fixed, and what is returned for it unused.
    """
    low, high = _range(x.detach(), axis, grid, init)
    unset = parameter == UNSET
    seen = (high > low) & torch.isfinite(low) & torch.isfinite(high)
    if how != "resolve":
        old_low, old_high = range_of(parameter, second, grid)
        if how == "extend":
            wide = torch.minimum(old_low, low), torch.maximum(old_high, high)
        else:
            wide = old_low + _FOLLOWS * (low - old_low), old_high + _FOLLOWS * (high - old_high)
        low, high = torch.where(unset, low, wide[0]), torch.where(unset, high, wide[1])
    chosen = seen & unset if how == "resolve" else seen
    found, other = state_of(low, high, grid)
    kept = torch.zeros_like(other) if second is None else second
    return torch.where(chosen, found, parameter), torch.where(chosen, other, kept)


def range_of(parameter: Tensor, second: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that a state clips to; where it is a reach from 0, by codes with a mirror."""
    scale = scale_of(parameter, None if grid.method == "lsq_plus" else second, grid)
    if grid.symmetric:
        reach = scale * ((grid.quant_max - grid.quant_min) // 2)
        return -reach, reach
    assert second is not None, "a zero point that is not fixed is part of the state"
    point = second if grid.method != "lsq_plus" else point_of(second, scale, grid.quant_min, grid.quant_max)
    above = grid.quant_max - point
    below = grid.quant_min - point
    # A lowest code without a mirror is no part of a reach: ranges that are widened by their own would grow.
    return (torch.maximum(below, -above) if grid.sided else below) * scale, above * scale


def state_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The parameter, and the zero point or offset, of a range; `range_of` is its inverse but for rounding."""
    scale, point = qparams_of(low, high, grid)
    above = grid.quant_max - point
    if grid.method == "tqt":
        return scale.log2() + _bits(above), point
    if grid.sided:
        return scale * above, point
    return scale, -point * scale if grid.method == "lsq_plus" else point


def qparams_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, as floats, of a range that holds 0."""
    if grid.sided or grid.symmetric:
        point = torch.full_like(low, grid.middle)
        if not grid.symmetric:
            point = torch.where(low < 0, point, grid.quant_min)
        reach, above = torch.maximum(-low, high), grid.quant_max - point
        if grid.method == "tqt":
            return power_of_two(reach.log2().ceil() - _bits(above)), point
        return (reach / above).clamp(grid.floor, _HIGHEST), point
    scale = divide_by_number(high - low, grid.quant_max - grid.quant_min).clamp(grid.floor, _HIGHEST)
    return scale, clamp_code(grid.quant_min - (low / scale).round(), grid.quant_min, grid.quant_max)


def _range(x: Tensor, axis: int | None, grid: Grid, init: Init) -> tuple[Tensor, Tensor]:
    """The range of a tensor, or of each slice; of a slice of zeros, the mean of the others'."""
    wide = x.to(torch.float32)
    rows = wide.reshape(1, -1) if axis is None else wide.movedim(axis, 0).reshape(x.shape[axis], -1)
    if rows.numel() == 0:
        nothing = rows.new_zeros(rows.shape[0])
        return nothing, nothing
    low, high = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
    if init == "mse":
        factor = _least_error(rows, low, high, grid)
        low, high = low * factor, high * factor
    some = high > low
    count = some.sum().clamp(min=1)
    return torch.where(some, low, low.sum() / count), torch.where(some, high, high.sum() / count)


def _least_error(rows: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """How much of each row's extremes to keep for the least squared error of its codes."""
    best = torch.full_like(low, math.inf)
    factor = torch.ones_like(low)
    for number in range(_CANDIDATES):
        part = _RATIO**number
        scale, point = (per_channel_view(each, 2, 0) for each in qparams_of(low * part, high * part, grid))
        codes = (rows / scale).round().add_(point).clamp_(grid.quant_min, grid.quant_max)
        error = codes.sub_(point).mul_(scale).sub_(rows).square_().sum(1)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, part, factor)
    return factor
