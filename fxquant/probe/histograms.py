"""The range of a site from histograms of what it saw: percentile, entropy and mean squared error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fxquant.ops import fake_quantize
from fxquant.spec.quant_spec import QuantSpec
from fxquant.tensor_quant.calibrators import HistogramCalibrator, entropy_end, percentile_end

Method = Literal["percentile", "entropy", "mse"]
_BINS = 2048
_START, _STRIDE = 128, 4  # the fewest bins that entropy keeps, and how many it goes on by
_ENDS = 256  # that are tried for the least squared error: k/256 of the largest magnitude
_AT_ONCE = 32


def why_not(spec: QuantSpec, method: str) -> str | None:
    """Why a method finds no range for a format; None if it does."""
    if not spec.range.takes_ends:
        return f"the range {spec.range} is not two ends"
    if method != "percentile" and spec.group_size is not None:
        return f"most of the rounding of {spec} is by the scales of groups"
    if method == "entropy" and spec.element is not None:
        return f"{spec} has no even levels"
    return None


class SiteHistogram:
    """What one activation site saw: extremes, and how many magnitudes lie where, in memory that data do not grow.

    Bins are as of `fxquant.tensor_quant.HistogramCalibrator`: 2048 of one width, which larger data merge in pairs, so
    that at least half of them lie below the largest magnitude. Equal batches in equal order give equal ranges.
    """

    def __init__(self, spec: QuantSpec, method: Method) -> None:
        self.spec, self.method = spec, method
        self.low, self.high = float("inf"), -float("inf")
        # Of one method only: signs matter where two ends of a range are tried together.
        count = 2 if method == "mse" else 1
        self.sides = [
            HistogramCalibrator(spec.bits, None, True, _BINS, "stretch", method == "mse") for _ in range(count)
        ]

    def collect(self, x: Tensor) -> None:
        """Takes a tensor into account; InvalidArgument for NaN and inf."""
        if not x.numel():
            return
        parts = (x.abs(),) if self.method != "mse" else (x.clamp(max=0).neg(), x.clamp(min=0))
        for side, part in zip(self.sides, parts, strict=True):
            side.collect(part)
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen."""
        return self.low > self.high

    def ends(self, percentile: float) -> tuple[float, float]:
        """The range that the method finds: magnitudes up to one end, no further than what was seen."""
        top = max(-self.low, self.high)
        if top == 0:
            return 0.0, 0.0
        end = self._mse_end(top) if self.method == "mse" else self._end(percentile)
        return max(self.low, -end), min(self.high, end)

    def _end(self, percentile: float) -> float:
        counts, edges = self.sides[0].counts, self.sides[0].bin_edges
        assert counts is not None and edges is not None, "what is not 0 has bins"
        counts = counts.double()
        if self.method == "percentile":
            return float(percentile_end(counts, edges, percentile))
        one_sided = not self.spec.symmetric and (self.low >= 0 or self.high <= 0)
        levels = 2 ** (self.spec.bits if one_sided else self.spec.bits - 1)
        return float(entropy_end(counts, edges, levels, _STRIDE, min(_START, len(counts) - 1)))

    def _mse_end(self, top: float) -> float:
        """Of equals the largest."""
        values, counts = self._signed()
        ends = torch.arange(_ENDS, 0, -1, dtype=torch.float64) * (top / _ENDS)
        errors = torch.cat([self._errors(part, values, counts) for part in ends.split(_AT_ONCE)])
        return float(ends[errors.argmin()])

    def _signed(self) -> tuple[Tensor, Tensor]:
        """Centres of the bins on both sides, float32, and what lies in each."""
        values, counts = [], []
        for sign, side in zip((-1.0, 1.0), self.sides, strict=True):
            found, edges = side.counts, side.bin_edges
            if found is not None and edges is not None:
                values.append(sign * (edges[1:] + edges[:-1]).cpu() / 2)
                counts.append(found.double().cpu())
        return torch.cat(values).float(), torch.cat(counts)

    def _errors(self, ends: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        """Squared error of each end's range, as the site would quantize."""
        spec = self.spec
        low, high = ends.neg().clamp(min=self.low).float(), ends.clamp(max=self.high).float()
        scale, point = spec.range.qparams_of_ends(low.clamp(max=0), high.clamp(min=0), spec)
        x = values.expand(len(ends), -1).contiguous()
        limits = (spec.quant_min, spec.quant_max)
        form = {"rounding": spec.rounding, "element": spec.element}
        y: Tensor = fake_quantize.PER_CHANNEL(x, scale, point, 0, *limits, **form)
        return ((y.double() - values) ** 2 * counts).sum(1)
