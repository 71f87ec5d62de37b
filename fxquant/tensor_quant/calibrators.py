"""What watches tensors and says which amax to quantize them with: `MaxCalibrator`, `HistogramCalibrator`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import amax as numerics
from fxquant.numerics.formats import float_format

METHODS = ("entropy", "percentile", "mse")
# Growing bin by bin ends here; from then on bins are merged in pairs, so that one outlier costs no memory.
_MOST_BINS = 1 << 16
_CANDIDATES_AT_ONCE = 128

NumBits = int | tuple[int, int]
Axis = int | tuple[int, ...] | None


def reduced_amax(x: Tensor, axis: Axis) -> Tensor:
    """The largest magnitude of each slice of ``axis``, float32 or float64: other dimensions have size 1.

    Without axis a 0-d tensor. 0 for what has no elements.
    """
    if axis is None:
        kept: set[int] = set()
    else:
        axes = axis if isinstance(axis, tuple) else (axis,)
        for each in axes:
            if not -x.dim() <= each < x.dim():
                raise InvalidArgument(f"axis must be from {-x.dim()} to {x.dim() - 1} for this input: got {each}.")
        kept = {each % x.dim() for each in axes}
    others = [d for d in range(x.dim()) if d not in kept]
    wide = numerics.widen(x.detach()).abs()
    if not others:  # amax over no dimension would mean all of them
        return wide
    if not wide.numel():
        return wide.new_zeros([] if axis is None else [n if d in kept else 1 for d, n in enumerate(wide.shape)])
    return wide.amax(dim=others, keepdim=axis is not None)


class Calibrator(ABC):
    """Collects tensors, then gives an amax.

    Args:
        num_bits: of the integer codes, or (E, M).
        axis: the dimensions each slice of which gets an amax, None for one.
        unsigned: codes start at 0; negative data are then an error.
    """

    def __init__(self, num_bits: NumBits, axis: Axis, unsigned: bool) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned

    @abstractmethod
    def collect(self, x: Tensor) -> None:
        """Takes a tensor into account; eager, as it reads values."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The amax of what was collected; None before any data."""

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise InvalidArgument(f"x must be a floating tensor to be calibrated on: got {x.dtype}.")
        if not x.numel():
            return
        low, high = (float(end) for end in x.detach().aminmax())
        if not (low - low == 0 and high - high == 0):  # NaN spreads to both ends, inf − inf is NaN
            raise InvalidArgument(f"x must be finite to be calibrated on: got values from {low} to {high}.")
        if self._unsigned and low < 0:
            raise TypeError("Negative values encountered in unsigned quantization.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_bits={self._num_bits}, axis={self._axis}, unsigned={self._unsigned})"


class MaxCalibrator(Calibrator):
    """amax is the largest magnitude seen, per tensor or per slice of ``axis``.

    Args:
        track_amax: keep the running amax after each `collect`, in `amaxs`.

    >>> calibrator = MaxCalibrator(8, None, False)
    >>> calibrator.collect(torch.tensor([-3.0, 2.0]))
    >>> calibrator.compute_amax()
    tensor(3.)
    """

    def __init__(self, num_bits: NumBits, axis: Axis, unsigned: bool, track_amax: bool = False) -> None:
        super().__init__(num_bits, axis, unsigned)
        self._track_amax = track_amax
        self._amax: Tensor | None = None
        self._amaxs: list[Tensor] = []

    @property
    def amaxs(self) -> list[Tensor]:
        """The running amax after each tensor, with ``track_amax=True``."""
        return list(self._amaxs)

    def _reduce(self, x: Tensor) -> Tensor:
        return reduced_amax(x, self._axis)

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Raises InvalidArgument for NaN, inf, and another number of slices than before."""
        self._check(x)
        local = self._reduce(x).to(torch.float32)
        if self._amax is None:
            self._amax = local.clone()
        elif self._amax.shape != local.shape:
            raise InvalidArgument(
                f"x must have as many slices as before: got amax of shape {tuple(local.shape)} after "
                f"{tuple(self._amax.shape)}. Call reset() to begin anew."
            )
        else:
            self._amax = torch.maximum(self._amax.to(local.device), local)
        if self._track_amax:
            self._amaxs.append(self._amax.clone())

    def reset(self) -> None:
        """Forgets everything."""
        self._amax = None
        self._amaxs = []

    def compute_amax(self) -> Tensor | None:
        """float32, of size 1 in every dimension but those of ``axis``; 0-d without axis; None before any data."""
        return None if self._amax is None else self._amax.clone()


class HistogramCalibrator(Calibrator):
    """amax from the histogram of magnitudes, per tensor: it may cut off what is rare.

    Bins have one width, the first tensor's largest magnitude / num_bins. Later, larger tensors add bins
    (``grow_method`` None or "append") or merge them in pairs ("stretch"; "append" too, beyond 65536 bins), so that
    counts stay exact.

    Args:
        skip_zeros: leave zeros out, as of padding.
    """

    def __init__(
        self,
        num_bits: NumBits,
        axis: Axis,
        unsigned: bool,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        if axis is not None:
            raise InvalidArgument(f"axis must be None for a histogram, which is per tensor: got {axis}. Use 'max'.")
        if num_bins < 2 or num_bins % 2:
            raise InvalidArgument(f"num_bins must be even and at least 2: got {num_bins}.")
        if grow_method not in (None, "append", "stretch"):
            raise InvalidArgument(f"grow_method must be None, 'append' or 'stretch': got {grow_method!r}.")
        self._num_bins = num_bins
        self._grow_method = grow_method
        self._skip_zeros = skip_zeros
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._counts: Tensor | None = None  # int64
        self._width = 0.0
        self._zeros = 0  # seen before the first value that gives bins a width
        self._empty = True

    @property
    def counts(self) -> Tensor | None:
        """How many magnitudes lie in each bin, int64. A bin holds its upper edge, the first one 0 too."""
        return None if self._counts is None else self._counts.clone()

    @property
    def bin_edges(self) -> Tensor | None:
        """The ends of the bins, float64: one more than there are bins."""
        return None if self._counts is None else self._edges(len(self._counts))

    def _edges(self, count: int) -> Tensor:
        assert self._counts is not None
        return torch.arange(count + 1, dtype=torch.float64, device=self._counts.device) * self._width

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Raises InvalidArgument for NaN and inf."""
        self._check(x)
        magnitudes = x.detach().reshape(-1).to(torch.float64).abs()
        if self._skip_zeros:
            magnitudes = magnitudes[magnitudes != 0]
        if not magnitudes.numel():
            return
        self._empty = False
        top = float(magnitudes.max())
        if self._counts is None:
            if top == 0:
                self._zeros += magnitudes.numel()
                return
            self._width = top / self._num_bins
            if self._width * self._num_bins < top:  # the quotient was rounded down
                self._width = math.nextafter(self._width, math.inf)
            self._counts = torch.zeros(self._num_bins, dtype=torch.int64, device=x.device)
            self._counts[0] = self._zeros
        self._counts = self._counts.to(x.device)
        self._grow(top)
        edges = self._edges(len(self._counts))
        index = (torch.bucketize(magnitudes, edges) - 1).clamp(min=0)
        self._counts += torch.bincount(index, minlength=len(self._counts))

    def _grow(self, top: float) -> None:
        """Bins up to ``top``, counts kept."""
        assert self._counts is not None
        # Bins hold their upper edge, so that neither way to grow moves a value into another bin.
        while top > len(self._counts) * self._width:
            count = len(self._counts)
            wanted = int(-(-top // self._width))
            wanted += wanted % 2 + 2 * (wanted * self._width < top)  # even; the quotient may have been rounded down
            if self._grow_method != "stretch" and wanted <= max(_MOST_BINS, count):
                self._counts = torch.nn.functional.pad(self._counts, (0, wanted - count))
            else:
                merged = self._counts.view(-1, 2).sum(1)
                self._counts = torch.nn.functional.pad(merged, (0, count - len(merged)))
                self._width *= 2

    def compute_amax(
        self, method: str = "entropy", *, percentile: float = 99.99, stride: int = 1, start_bin: int = 128
    ) -> Tensor | None:
        """A 0-d float32 amax; None before any data, 0 if all were 0.

        Args:
            method: ``"entropy"``: the range whose quantized histogram has the least Kullback-Leibler divergence from
                the clipped one, of equals the largest (TensorRT's calibration). ``"percentile"``: the lowest bin
                edge with ``percentile`` % of the data at or below it. ``"mse"``: the bin centre that gives the least
                mean squared error, of equals the smallest.
            stride: entropy and mse try every stride-th bin.
            start_bin: entropy and mse begin with this one; fewer bins are no candidate.
        """
        if method not in METHODS:
            raise InvalidArgument(f"method must be one of {METHODS}: got {method!r}.")
        if not 0 <= percentile <= 100:
            raise InvalidArgument(f"percentile must be from 0 to 100: got {percentile}.")
        if stride < 1 or start_bin < 1:
            raise InvalidArgument(f"stride and start_bin must be at least 1: got {stride} and {start_bin}.")
        if self._counts is None:
            return None if self._empty else torch.zeros(())
        counts, edges = self._counts.to(torch.float64), self._edges(len(self._counts))
        start = min(start_bin, len(counts) - 1)
        if method == "percentile":
            found = percentile_end(counts, edges, percentile)
        elif method == "entropy":
            if not isinstance(self._num_bits, int):
                raise InvalidArgument(f"method must be 'percentile' or 'mse' for num_bits={self._num_bits}.")
            found = entropy_end(counts, edges, 2 ** (self._num_bits - 1 + self._unsigned), stride, start)
        else:
            found = _mse(counts, edges, self._num_bits, self._unsigned, stride, start)
        return found.to(torch.float32)


def percentile_end(counts: Tensor, edges: Tensor, percentile: float) -> Tensor:
    """The lowest bin edge with ``percentile`` % of the counts at or below it."""
    reached = counts.cumsum(0) >= counts.sum() * (percentile / 100)
    return edges[int(reached.to(torch.int8).argmax()) + 1]


def entropy_end(counts: Tensor, edges: Tensor, levels: int, stride: int, start: int) -> Tensor:
    """The end of the range that loses least information, of equals the largest, of ranges from ``start`` bins on.

    Of each count i of bins kept: clip the rest into the last, spread i bins over the levels, compare.
    """
    bins = counts.clone()
    bins[0] = bins[1]  # exact zeros need no range, and are often most of the data
    zero = bins.new_zeros(1)
    below = torch.cat([zero, bins.cumsum(0)])
    filled = torch.cat([zero, (bins > 0).to(bins.dtype).cumsum(0)])
    candidates = range(start, len(bins) + 1, stride)
    divergences = [_divergence(bins, below, filled, i, levels) for i in candidates]
    best = min(divergences)
    last = max(k for k, value in enumerate(divergences) if value == best)
    return edges[candidates[last]]


def _divergence(bins: Tensor, below: Tensor, filled: Tensor, i: int, levels: int) -> float:
    clipped = bins[:i].clone()
    clipped[-1] += below[-1] - below[i]
    level = torch.arange(i, device=bins.device) * levels // i
    first = (torch.arange(levels + 1, device=bins.device) * i + levels - 1) // levels  # of each level's bins
    shares = (below[first[1:]] - below[first[:-1]]) / (filled[first[1:]] - filled[first[:-1]])
    quantized = torch.where(bins[:i] > 0, shares[level], 0.0)
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    # 0 · log 0 is 0; a clipped rest where no level is filled is infinitely far off.
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)
    total = float(terms.sum())
    return total if total == total else float("inf")


def _mse(counts: Tensor, edges: Tensor, num_bits: NumBits, unsigned: bool, stride: int, start: int) -> Tensor:
    centres = (edges[1:] + edges[:-1]) / 2
    candidates = centres[start::stride]
    errors = []
    for amax in candidates.split(_CANDIDATES_AT_ONCE):
        x, reach = centres.expand(len(amax), -1), amax.unsqueeze(1)
        if isinstance(num_bits, int):
            y = numerics.fake_tensor_quant(x, reach, num_bits, unsigned, True)
        else:
            y = numerics.scaled_float(x, reach, float_format(num_bits))
        errors.append(((y - centres) ** 2 * counts).sum(1))
    return candidates[torch.cat(errors).argmin()]
