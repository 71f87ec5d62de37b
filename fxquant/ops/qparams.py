"""Ranges and quantization parameters as ops: functional, without gradient, without any host read.

Ranges are float32 tensors of one element. An empty range, whose minimum lies just above 0 and maximum just below,
stands for "nothing seen yet" or "only zeros seen": averages of it stay finite, and the next batch sets it. Which of
the two a bound tells by itself: an update of one in place must not read the other. NaN is read as "nothing seen", too.
A batch with a non-finite value leaves the range as it was.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.blocks import SCALE_FORMATS, IntegerGrid, block_scales
from fxquant.numerics.division import divide_by_number
from fxquant.numerics.formats import float_format
from fxquant.ops.library import define

# torch.ao's floor for activation scales; a constant-zero tensor then has codes 0 and exact zeros.
ACTIVATION_SCALE_FLOOR = torch.finfo(torch.float32).eps
# A range from −3e38 to 3e38 is finite, its width is not: 0 · inf would make NaN of every value.
_SCALE_CEILING = torch.finfo(torch.float32).max
# Far below any weight that matters, so that folding a small BatchNorm factor scales codes exactly.
WEIGHT_SCALE_FLOOR = 2.0**-60
# An empty range is (number, −number): no tensor worth quantizing has a bound so near to 0 that is not 0 itself.
NOTHING_SEEN = torch.finfo(torch.float32).tiny
ONLY_ZEROS = 2 * NOTHING_SEEN


def _batch_min_max(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(), x.amax()
    return low.to(torch.float32).expand(like.shape), high.to(torch.float32).expand(like.shape)


Range = tuple[Tensor, Tensor]  # minimum and maximum


def _keep_unless_finite(low: Tensor, high: Tensor, new: Range, old: Range) -> Range:
    finite = torch.isfinite(low) & torch.isfinite(high)
    return torch.where(finite, new[0], old[0]), torch.where(finite, new[1], old[1])


def _batch(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        infinite = x.new_full((1,), math.inf, dtype=torch.float32)
        return infinite, -infinite
    return x.amin().to(torch.float32).reshape(1), x.amax().to(torch.float32).reshape(1)


def _batch_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((1,), dtype=torch.float32), x.new_empty((1,), dtype=torch.float32)


def _channel(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.dim()) if d != axis % x.dim()]
    if x.numel() == 0:
        low, high = x.new_zeros(x.shape[axis]), x.new_zeros(x.shape[axis])
    else:  # amin of no dimension would mean all of them; an operator's results are nobody else's memory
        low, high = (x.amin(others), x.amax(others)) if others else (x.clone(), x.clone())
    return low.to(torch.float32), high.to(torch.float32)


def _channel_like(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[axis], dtype=torch.float32), x.new_empty(x.shape[axis], dtype=torch.float32)


def _update(x: Tensor, minimum: Tensor, maximum: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return minimum.clone(), maximum.clone()
    return _average(*_batch_min_max(x, minimum), minimum, maximum, constant)


def _update_in_parts(x: Tensor, minimum: Tensor, maximum: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """The extremes, which fuse with what makes x, and the average of them as one node."""
    if x.numel() == 0:
        return minimum.clone(), maximum.clone()
    return AVERAGE_MIN_MAX(*_batch_min_max(x, minimum), minimum, maximum, constant)


def _holds_low(minimum: Tensor) -> Tensor:
    """Whether a minimum was seen that is not of zeros only."""
    return (minimum <= 0) | (minimum > ONLY_ZEROS)


def _holds_high(maximum: Tensor) -> Tensor:
    return (maximum >= 0) | (maximum < -ONLY_ZEROS)


def _first(low: Tensor, high: Tensor) -> Range:
    """The range of a first batch: empty if that is all zeros, for the next to set it."""
    zeros = (low == 0) & (high == 0)
    return torch.where(zeros, ONLY_ZEROS, low), torch.where(zeros, -ONLY_ZEROS, high)


def _average(low: Tensor, high: Tensor, minimum: Tensor, maximum: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    first_low, first_high = _first(low, high)
    new = (
        torch.where(_holds_low(minimum), minimum + constant * (low - minimum), first_low),
        torch.where(_holds_high(maximum), maximum + constant * (high - maximum), first_high),
    )
    return _keep_unless_finite(low, high, new, (minimum, maximum))


def _extend(x: Tensor, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return minimum.clone(), maximum.clone()
    low, high = _batch_min_max(x, minimum)
    zeros = (minimum > NOTHING_SEEN) & (minimum <= ONLY_ZEROS)
    wide = torch.where(zeros, 0.0, minimum), torch.where(zeros, 0.0, maximum)
    new = _first(
        torch.where(_holds_low(wide[0]), torch.minimum(wide[0], low), low),
        torch.where(_holds_high(wide[1]), torch.maximum(wide[1], high), high),
    )
    return _keep_unless_finite(low, high, new, (minimum, maximum))


def _resolve(x: Tensor, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return minimum.clone(), maximum.clone()
    low, high = _batch_min_max(x, minimum)
    return torch.where(_holds_low(minimum), minimum, low), torch.where(_holds_high(maximum), maximum, high)


def _average_like(low: Tensor, high: Tensor, minimum: Tensor, maximum: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(minimum), torch.empty_like(maximum)


def _ranges_like(x: Tensor, minimum: Tensor, maximum: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(minimum), torch.empty_like(maximum)


def _affine(
    minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int, symmetric: bool, element: str | None = None
) -> tuple[Tensor, Tensor]:
    low, high = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    if symmetric:
        reach = (quant_max - quant_min) // 2 if element is None else float_format(element).max
        scale = divide_by_number(torch.maximum(-low, high), reach).clamp(ACTIVATION_SCALE_FLOOR, _SCALE_CEILING)
        middle = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = divide_by_number(high - low, quant_max - quant_min).clamp(ACTIVATION_SCALE_FLOOR, _SCALE_CEILING)
    point = quant_min - torch.round(low / scale)
    # The comparison is false for NaN, which has no integer: the casts of different devices would not agree on one.
    point = torch.where(point >= quant_min, point, quant_min).clamp(max=quant_max)
    return scale, point.to(torch.int32)


def _affine_like(minimum: Tensor, *_: Tensor | int, **__: str | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(minimum), torch.empty_like(minimum, dtype=torch.int32)


def _symmetric(x: Tensor, axis: int | None, quant_max: int, element: str | None = None) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.dim()) if d != axis]
    # amax of no dimension would mean all of them: a 1-D tensor per channel keeps its elements.
    if x.numel() == 0:
        amax = x.new_zeros(() if axis is None else x.shape[axis])
    else:
        amax = x.abs().amax(dim=others) if others else x.abs()
    reach = quant_max if element is None else float_format(element).max
    scale = divide_by_number(amax.to(torch.float32), reach).clamp(min=WEIGHT_SCALE_FLOOR)
    if axis is None:
        scale = scale.reshape(1)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _symmetric_like(x: Tensor, axis: int | None, quant_max: int, element: str | None = None) -> tuple[Tensor, Tensor]:
    count = 1 if axis is None else x.shape[axis]
    return x.new_empty(count, dtype=torch.float32), x.new_empty(count, dtype=torch.int32)


def _blocks(
    rows: Tensor, tensor_amax: Tensor | None, quant_max: int, scale_format: str, element: str | None = None
) -> tuple[Tensor, Tensor]:
    if scale_format not in SCALE_FORMATS:
        known = ", ".join(map(repr, SCALE_FORMATS))
        raise InvalidArgument(f"`scale_format` must be one of {known}: got {scale_format!r}.")
    grid = IntegerGrid(-quant_max, quant_max) if element is None else float_format(element)
    scale = block_scales(rows, grid, scale_format, tensor_amax)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _blocks_like(
    rows: Tensor, tensor_amax: Tensor | None, quant_max: int, scale_format: str, element: str | None = None
) -> tuple[Tensor, Tensor]:
    return _symmetric_like(rows, 0, quant_max)


BATCH_MIN_MAX = define("batch_min_max(Tensor input) -> (Tensor, Tensor)", _batch, fake=_batch_like)
CHANNEL_MIN_MAX = define("channel_min_max(Tensor input, int axis) -> (Tensor, Tensor)", _channel, fake=_channel_like)
AVERAGE_MIN_MAX = define(
    "average_min_max(Tensor low, Tensor high, Tensor min, Tensor max, float constant) -> (Tensor, Tensor)",
    _average,
    fake=_average_like,
)
UPDATE_MIN_MAX = define(
    "update_min_max(Tensor input, Tensor min, Tensor max, float constant) -> (Tensor, Tensor)",
    _update,
    fake=_ranges_like,
    traced_as=_update_in_parts,
)
EXTEND_MIN_MAX = define(
    "extend_min_max(Tensor input, Tensor min, Tensor max) -> (Tensor, Tensor)", _extend, fake=_ranges_like
)
RESOLVE_MIN_MAX = define(
    "resolve_min_max(Tensor input, Tensor min, Tensor max) -> (Tensor, Tensor)", _resolve, fake=_ranges_like
)
AFFINE_QPARAMS = define(
    "affine_qparams(Tensor min, Tensor max, int quant_min, int quant_max, bool symmetric, *, str? element=None) "
    "-> (Tensor, Tensor)",
    _affine,
    fake=_affine_like,
)
SYMMETRIC_QPARAMS = define(
    "symmetric_qparams(Tensor input, int? axis, int quant_max, *, str? element=None) -> (Tensor, Tensor)",
    _symmetric,
    fake=_symmetric_like,
)
BLOCK_QPARAMS = define(
    "block_qparams(Tensor rows, Tensor? tensor_amax, int quant_max, str scale_format, *, str? element=None) "
    "-> (Tensor, Tensor)",
    _blocks,
    fake=_blocks_like,
)

QPARAM_OPS = (
    BATCH_MIN_MAX,
    CHANNEL_MIN_MAX,
    AVERAGE_MIN_MAX,
    UPDATE_MIN_MAX,
    EXTEND_MIN_MAX,
    RESOLVE_MIN_MAX,
    AFFINE_QPARAMS,
    SYMMETRIC_QPARAMS,
    BLOCK_QPARAMS,
)


def batch_min_max(input: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum as float32 of shape [1]; of nothing, (inf, −inf), which no average takes up."""
    return BATCH_MIN_MAX(input)


def channel_min_max(input: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each slice of ``axis``, as float32 of shape [slices]; of empty ones 0."""
    return CHANNEL_MIN_MAX(input, axis)


def average_min_max(low: Tensor, high: Tensor, min: Tensor, max: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """`update_min_max` from extremes that are known: many ranges in one call, an element each."""
    return AVERAGE_MIN_MAX(low, high, min, max, constant)


def update_min_max(input: Tensor, min: Tensor, max: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """Moving average ``r + constant · (batch − r)`` of min and max; the first that is not zeros sets it."""
    return UPDATE_MIN_MAX(input, min, max, constant)


def extend_min_max(input: Tensor, min: Tensor, max: Tensor) -> tuple[Tensor, Tensor]:
    """The range widened to hold the input too: calibration by the extremes of everything seen."""
    return EXTEND_MIN_MAX(input, min, max)


def resolve_min_max(input: Tensor, min: Tensor, max: Tensor) -> tuple[Tensor, Tensor]:
    """The range, or the input's own where none was seen yet; nothing is stored."""
    return RESOLVE_MIN_MAX(input, min, max)


def affine_qparams(
    min: Tensor, max: Tensor, quant_min: int, quant_max: int, symmetric: bool, *, element: str | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) for a range widened to hold 0: float32 and int32, shaped like ``min``.

    Asymmetric: ``scale = (max − min) / (quant_max − quant_min)``, ``zero_point = quant_min − round(min / scale)``.
    Symmetric: ``scale = max(−min, max) / ((quant_max − quant_min) // 2)``, zero_point in the middle; with ``element``,
    a small float format, over that format's largest value.
    """
    return AFFINE_QPARAMS(min, max, quant_min, quant_max, symmetric, element=element)


def symmetric_qparams(
    input: Tensor, axis: int | None, quant_max: int, *, element: str | None = None
) -> tuple[Tensor, Tensor]:
    """(amax / quant_max, 0) of the tensor itself, per slice of ``axis`` or for the whole (then of shape [1]).

    With ``element``, a small float format, over that format's largest value.
    """
    return SYMMETRIC_QPARAMS(input, axis, quant_max, element=element)


def block_qparams(
    rows: Tensor,
    tensor_amax: Tensor | None,
    quant_max: int,
    scale_format: str,
    *,
    element: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, 0) of each row of a matrix, a block of values, quantized in turn; float32 and int32 of shape [rows].

    ``max`` is ``quant_max``, or the largest value of ``element``, a small float format::

        "e8m0"   2^(floor(log2 amax) − floor(log2 max)), from 2^−127 to 2^127      OCP MX v1.0
        "e4m3"   e4m3(amax / max / g) · g,  g = tensor_amax / (max · 448)          NVFP4

    ``tensor_amax`` is one element, the rows' own by default; it has no use with "e8m0". A row of zeros has a scale of
    its own in "e8m0" and 0 in "e4m3".

    Raises InvalidArgument for another ``scale_format``.

    Source: OCP Microscaling Formats (MX) v1.0; NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
    """
    return BLOCK_QPARAMS(rows, tensor_amax, quant_max, scale_format, element=element)
