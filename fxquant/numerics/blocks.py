"""Quantizers with one scale per block: microscaling (MX), NVFP4, integer blocks, scales quantized in turn.

A block is a box of ``sizes`` along ``axes``. Each blocked dimension D becomes two, ``[ceil(D / size), size]``, so a
block's scale is a reduction over the second ones, broadcast back::

    y = round(x / scale) · scale        round: half to even on the element's grid, saturating at its largest value

A size that does not divide its dimension is filled up with zeros, which no absolute maximum sees, and cut back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.division import divide_by_number, reciprocal
from fxquant.numerics.floating import power_of_two_below, round_to_float, widen
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat
from fxquant.numerics.stochastic import round_by_chance, uniform

# E8M0, the scale of MX: powers of two between these. The lower one is subnormal in float32.
_E8M0_MIN, _E8M0_MAX = 2.0**-127, 2.0**127
_INFINITY = float("inf")


@dataclass(frozen=True)
class IntegerGrid:
    """The multiples of ``step`` from ``low`` to ``high``, counted in steps; ``step`` is a power of two."""

    low: int
    high: int
    step: float = 1.0

    @property
    def max(self) -> float:
        """The largest value."""
        return self.high * self.step

    @property
    def emax(self) -> int:
        """Exponent of the largest value: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1


Element = FloatFormat | IntegerGrid

MXINT8 = IntegerGrid(-127, 127, 2.0**-6)
"""Two's complement with an implied factor 2^−6; −128 is left out so that values mirror at 0."""


@dataclass(frozen=True)
class Blocks:
    """Where blocks lie: axes counted from the front, ascending, and a size for each."""

    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def inner(self) -> list[int]:
        """The dimensions of the block view that run within a block."""
        return [axis + i + 1 for i, axis in enumerate(self.axes)]

    def counts(self, x: Tensor) -> list[int]:
        """The shape of the grid of blocks: x's, with the number of blocks along each axis."""
        shape = list(x.shape)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            # Two forms of one number: the first keeps symbolic sizes simple, and is not known to be right otherwise.
            shape[axis] = shape[axis] // size if _divides(size, shape[axis]) else (shape[axis] + size - 1) // size
        return shape

    def split(self, x: Tensor) -> Tensor:
        """x as its block view; a view of x itself where every size divides."""
        if x.numel() and self._cut(x):
            x = torch.nn.functional.pad(x, self._padding(x))
        shape: list[int] = []
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        counts = self.counts(x)
        for axis, count in enumerate(counts):
            shape += [count, sizes[axis]] if axis in sizes else [count]
        return x.reshape(shape)

    def _padding(self, x: Tensor) -> list[int]:
        missing = [0] * x.dim()
        counts = self.counts(x)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            missing[axis] = counts[axis] * size - x.shape[axis]
        return [width for last in reversed(missing) for width in (0, last)]

    def _cut(self, x: Tensor) -> list[int]:
        """The axes whose last block may be incomplete."""
        pairs = zip(self.axes, self.sizes, strict=True)
        return [axis for axis, size in pairs if not _divides(size, x.shape[axis])]

    def join(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`, without what was filled up; ``like`` has the shape to come back to."""
        counts = self.counts(like)
        shape = list(counts)
        for axis, size in zip(self.axes, self.sizes, strict=True):
            shape[axis] = counts[axis] * size
        joined = blocks.reshape(shape)
        cut = self._cut(like)
        for axis in cut:
            joined = joined.narrow(axis, 0, like.shape[axis])
        return joined.clone() if cut else joined  # the rest of a padded buffer is not kept alive

    def spread(self, grid: Tensor, x: Tensor) -> Tensor:
        """One value per block, of the grid's shape or one that broadcasts to it, broadcastable to the block view."""
        grid = grid.expand(self.counts(x))
        for dim in self.inner:
            grid = grid.unsqueeze(dim)
        return grid

    def amax(self, blocks: Tensor) -> Tensor:
        """The largest magnitude of each block, inner dimensions kept as 1."""
        return blocks.abs().amax(self.inner, keepdim=True)


def _divides(size: int, length: int | torch.SymInt) -> bool:
    """Whether it is known to: asking a symbolic size would fix it."""
    if isinstance(length, int):
        return length % size == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # not loaded by `import torch`

    return statically_known_true(length % size == 0)


def round_to_element(x: Tensor, element: Element, noise: Tensor | None) -> Tensor:
    """x on the element's grid, saturating; by chance where ``noise`` (uniform) is given. NaN stays NaN."""
    if isinstance(element, FloatFormat):
        return round_to_float(x, element, uniform=noise)
    steps = x if element.step == 1.0 else x * (1.0 / element.step)
    code = steps.round() if noise is None else round_by_chance(steps, noise)
    code = code.clamp(element.low, element.high)
    return code if element.step == 1.0 else code * element.step


def mx_scale(amax: Tensor, element: Element, scale_rounding: str) -> Tensor:
    """A power of two for each amax: see `fake_quantize_mx`."""
    # Compilers compute this once for each vector of elements, not once for each block: every operation counts. Of a
    # block of zeros any scale gives zeros, so only inf and NaN, which have the exponent of inf, need one of their own.
    below = power_of_two_below(amax)
    scale = torch.where(below < _INFINITY, below * 2.0**-element.emax, 1.0)
    scale = torch.where(scale > _E8M0_MIN, scale, _E8M0_MIN)
    if amax.dtype == torch.float64:  # float32 ends where E8M0 does
        scale = scale.clamp(max=_E8M0_MAX)
    if scale_rounding == "ceil":
        # max · scale is exact: a few bits times a power of two.
        larger = (amax > scale * element.max) & (below < _INFINITY) & (scale < _E8M0_MAX)
        scale = torch.where(larger, scale * 2, scale)
    return scale


def fake_quantize_mx(x: Tensor, at: Blocks, element: Element, scale_rounding: str, seed: Tensor | None) -> Tensor:
    """Elements on a small grid, with a power of two per block."""
    wide = widen(x)
    blocks = at.split(wide)
    scale = mx_scale(at.amax(blocks), element, scale_rounding)
    # A power of two has an exact reciprocal: one division per block, not one per element.
    y = round_to_element(blocks * reciprocal(scale), element, _noise(wide, at, seed)) * scale
    return at.join(y, x).to(x.dtype)


def _noise(wide: Tensor, at: Blocks, seed: Tensor | None) -> Tensor | None:
    return None if seed is None else at.split(uniform(seed, wide, wide.dtype))


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales of blocks are quantized in turn: to a float format, or to unsigned integers by blocks of them."""

    element: Element
    at: Blocks | None = None


def fake_quantize_blocks(
    x: Tensor,
    at: Blocks,
    element: Element,
    scales: ScaleFormat | None,
    amax: Tensor | None,
    tensor_amax: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Elements on a small grid, with ``scale = amax / element.max`` per block, quantized in turn or not."""
    wide = widen(x)
    blocks = at.split(wide)
    reach = at.amax(blocks) if amax is None else at.spread(amax.to(wide.dtype), x)
    if scales is not None and scales.at is None:
        scale = _scale_by_tensor(reach.to(torch.float32), element, scales.element, tensor_amax).to(wide.dtype)
    else:
        scale = divide_by_number(reach if amax is None else reach.clamp(min=0.0), element.max)
        scale = torch.where(scale < _INFINITY, scale, 1.0)
        if scales is not None and scales.at is not None:
            scale = _scale_by_block(scale, at, scales.element, scales.at)
    y = round_to_element(blocks / torch.where(scale > 0, scale, 1.0), element, _noise(wide, at, seed)) * scale
    return at.join(y, x).to(x.dtype)


def _scale_by_tensor(amax: Tensor, element: Element, format: Element, tensor_amax: Tensor | None) -> Tensor:
    """``format(amax / element.max / g) · g`` with one g per tensor, that puts the largest scale at format.max."""
    if tensor_amax is None:
        tensor_amax = amax.amax() if amax.numel() else amax.new_zeros(())
    unit = tensor_unit(tensor_amax, element, format)
    ratio = divide_by_number(amax.clamp(min=0.0), element.max) / unit
    ratio = torch.where(ratio < format.max, ratio, format.max)  # of a NaN too: it then stays alone in its block
    return round_to_element(ratio, format, None) * unit


def tensor_unit(tensor_amax: Tensor, element: Element, format: Element) -> Tensor:
    """The one scale of a tensor that puts the largest scale of its blocks at the format's largest value."""
    unit = divide_by_number(tensor_amax.to(torch.float32).reshape(()), element.max * format.max)
    return torch.where((unit > 0) & (unit < _INFINITY), unit, 1.0)


SCALE_FORMATS = ("e8m0", "e4m3")
"""What the scales of blocks can be quantized to, each in its own way."""


def block_scales(rows: Tensor, element: Element, scale_format: str, tensor_amax: Tensor | None) -> Tensor:
    """The scale of each row of a matrix, in float32, as `fake_quantize_mx` and `fake_quantize_blocks` have them."""
    amax = rows.abs().amax(1).to(torch.float32)
    if scale_format == "e8m0":
        return mx_scale(amax, element, "floor")
    return _scale_by_tensor(amax, element, FLOAT_FORMATS[scale_format], tensor_amax)


def _scale_by_block(scale: Tensor, at: Blocks, grid: Element, scale_at: Blocks) -> Tensor:
    """Scales as multiples of the largest of their own block, over the number of codes."""
    shape = scale.shape
    flat = scale.squeeze(at.inner)
    return fake_quantize_blocks(flat, scale_at, grid, None, None, None, None).reshape(shape)


def within_amax(grad: Tensor, x: Tensor, at: Blocks, amax: Tensor | None, tensor_amax: Tensor | None) -> Tensor:
    """``grad`` where |x| is at most each amax that was given, 0 elsewhere and for NaN."""
    wide = widen(x)
    if amax is not None:
        inside = at.join(at.split(wide).abs() <= at.spread(amax.to(wide.dtype), x), x)
        grad = torch.where(inside, grad, 0.0)
    if tensor_amax is not None:
        grad = torch.where(wide.abs() <= tensor_amax.to(wide.dtype).reshape(()), grad, 0.0)
    return grad
