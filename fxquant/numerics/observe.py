"""Moving-average observation as torch's fused observer computes it, without a host read.

One step, for a tensor or for each slice of an axis::

    range  ← r + constant · (batch − r)             an infinite r is unset and takes the batch's value
    scale  = (max − min) / (quant_max − quant_min)   of the range widened to hold 0
    point  = round(quant_min − min / scale), or round(quant_max − max / scale) where that is the smaller sum

torch takes the range in float32 and scale and zero point in double; the casts here are in the same places, so the
results are the same bits. Different on purpose: a batch with a non-finite extreme leaves its range as it was, where
torch lets one NaN stay for ever. The fake quantization that follows can be switched off by a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.numerics import affine
from fxquant.numerics.division import Rounding, divide_by_number, reciprocal

# 6.1e-5 in float32, about the smallest normal float16: torch raises smaller scales to it.
SMALLEST_SCALE = 6.0999998822808266e-05
# What torch takes for a range of no width, whose scale has no finite reciprocal.
DEGENERATE_SCALE = 0.1


class State(NamedTuple):
    """The four tensors that an observer keeps."""

    min: Tensor
    max: Tensor
    scale: Tensor
    zero_point: Tensor


def batch_range(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """(min, max) in float32, of everything or of each slice of ``axis``; NaN where there is one."""
    others = [d for d in range(x.dim()) if d != axis]
    # amin over an empty list of dimensions means all of them.
    low, high = (x.amin(others), x.amax(others)) if others else (x, x)
    return low.to(torch.float32), high.to(torch.float32)


def moving_average(old: Tensor, batch: Tensor, constant: float) -> Tensor:
    """One step of the average; an infinite ``old`` is unset."""
    return torch.where(torch.isinf(old), batch, old + constant * (batch - old))


def choose_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of a float32 range: float32 and int32, torch's choice bit for bit.

    ``symmetric`` widens a range on both sides of 0 to mirror and puts its zero point in the middle; a range on one
    side of 0 keeps its own scale and zero point. A NaN range gives scale NaN and zero point ``quant_min``.
    """
    steps = quant_max - quant_min
    if symmetric:
        low, high = _mirror(low, high, steps)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = divide_by_number(high.double() - low.double(), steps).to(torch.float32)
    scale = torch.where((scale == 0.0) | torch.isinf(reciprocal(scale)), DEGENERATE_SCALE, scale)
    low, high = _stretch(low, high, scale, steps)
    scale = scale.clamp(min=SMALLEST_SCALE)
    point = _zero_point(low.double() / scale.double(), high.double() / scale.double(), quant_min, quant_max)
    if symmetric:
        point = torch.where((low < 0) & (high > 0), (quant_min + quant_max) / 2, point)
    # The comparison is false for NaN, which has no integer; the casts of different devices would not agree on one.
    point = torch.where(point >= quant_min, point, quant_min).clamp(max=quant_max)
    return scale, point.round().to(torch.int32)


def _mirror(low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A range on both sides of 0, widened to ``[−(n + 1), n]`` times one scale."""
    negative, positive = -(steps // 2 + 1), steps // 2
    scale = torch.maximum(divide_by_number(low, negative).abs(), divide_by_number(high, positive).abs()).double()
    wide = (scale * negative).to(torch.float32), (scale * positive).to(torch.float32)
    both = (low < 0) & (high > 0)
    return torch.where(both, wide[0], low), torch.where(both, wide[1], high)


def _stretch(low: Tensor, high: Tensor, scale: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The range that goes with the smallest scale, where ``scale`` is below it."""
    small = scale < SMALLEST_SCALE
    # As a tensor: a number over a tensor is a product with the reciprocal, which is rounded twice.
    smallest = torch.full_like(scale, SMALLEST_SCALE)
    factor, reach = smallest / scale, smallest * steps
    from_zero, to_zero = low == 0.0, high == 0.0
    new_low = torch.where(from_zero, low, torch.where(to_zero, -reach, low * factor))
    new_high = torch.where(from_zero, reach, torch.where(to_zero, high, high * factor))
    return torch.where(small, new_low, low), torch.where(small, new_high, high)


def _zero_point(low_steps: Tensor, high_steps: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The unrounded zero point, from the end that is nearer to its own code."""
    from_low, from_high = quant_min - low_steps, quant_max - high_steps
    low_first = abs(quant_min) + low_steps.abs() < abs(quant_max) + high_steps.abs()
    return torch.where(low_first, from_low, from_high)


def observe(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    state: State,
    constant: float,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    symmetric: bool,
    delayed: bool,
) -> tuple[State, Tensor, Tensor]:
    """The next state, and the (scale, zero_point) to quantize ``x`` with; an empty ``x`` changes nothing.

    The two switches have one element. ``delayed``: scale and zero point are those of the range at entry, of the
    new range where none is set yet; the next state is the same either way.
    """
    if x.numel() == 0:
        kept = State(*(tensor.clone() for tensor in state))
        return kept, state.scale.clone(), state.zero_point.clone()
    low, high = (value.reshape(state.min.shape) for value in batch_range(x, axis))
    moves = torch.isfinite(low) & torch.isfinite(high) & (observer_on != 0).reshape(())
    new_min = torch.where(moves, moving_average(state.min, low, constant), state.min)
    new_max = torch.where(moves, moving_average(state.max, high, constant), state.max)
    on = (fake_quant_on != 0).reshape(())
    scale, point = _shaped(choose_qparams(new_min, new_max, quant_min, quant_max, symmetric), state)
    new = State(new_min, new_max, torch.where(on, scale, state.scale), torch.where(on, point, state.zero_point))
    if delayed:
        entry_min = torch.where(torch.isinf(state.min), new_min, state.min)
        entry_max = torch.where(torch.isinf(state.max), new_max, state.max)
        scale, point = _shaped(choose_qparams(entry_min, entry_max, quant_min, quant_max, symmetric), state)
    return new, scale, point


def _shaped(qparams: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, Tensor]:
    scale, point = qparams
    return scale.reshape(state.scale.shape), point.reshape(state.zero_point.shape).to(state.zero_point.dtype)


def switched_fake_quantize(
    x: Tensor,
    on: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Tensor:
    """Affine fake quantization where ``on``, else ``x``."""
    if axis is None:
        point = zero_point.reshape(())
        y = affine.fake_quantize_per_tensor(x, scale.reshape(()), point, quant_min, quant_max, rounding)
    else:
        y = affine.fake_quantize_per_channel(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    return torch.where(on, y, x)


def switched_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    on: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> Tensor:
    """``grad · mask``, with a mask of ones where ``on`` is false."""
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    else:
        scale, zero_point = (affine.per_channel_view(v, x.dim(), axis) for v in (scale, zero_point))
    code = affine.code_before_clamp(x, scale, zero_point, rounding)
    return grad * (affine.clip_mask(code, quant_min, quant_max) | ~on).to(grad.dtype)
