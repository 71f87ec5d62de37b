"""`MovingAverage`: minimum and maximum that follow the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.errors import InvalidArgument
from fxquant.ops import qparams
from fxquant.spec.mode import Mode
from fxquant.spec.ranges.base import UNSET, Range
from fxquant.spec.ranges.site_graph import Format, Qparams, SiteGraph, affine_qparams


@dataclass(frozen=True, kw_only=True)
class MovingAverage(Range):
    """Min and max follow the data in training: ``r ← r + constant·(batch − r)``, the first batch sets them.

    Updated before the batch is quantized (torch's MovingAverageMinMaxObserver). ``delayed``: after it, so that a step
    is quantized with the range that the step before left, the first with its own. No kernel then waits for the
    minimum and maximum of the tensor that it quantizes; the ranges that are kept are the same.
    """

    kind: ClassVar[str] = "moving_average"
    state_names: ClassVar[tuple[str, ...]] = ("min_val", "max_val")
    takes_ends: ClassVar[bool] = True
    constant: float = 0.01
    delayed: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.constant <= 1.0:
            raise InvalidArgument(f"MovingAverage.constant must be in (0, 1]: got {self.constant}.")

    def initial_state(self, format: Format, scales: int = 1) -> dict[str, Tensor]:
        """An empty range: its minimum is above its maximum, both next to 0."""
        unset = {"min_val": qparams.NOTHING_SEEN, "max_val": -qparams.NOTHING_SEEN}
        return {name: torch.full((1,), number, dtype=torch.float32) for name, number in unset.items()}

    def is_set(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it has seen data, be it zeros only."""
        low, high = state["min_val"].item(), state["max_val"].item()
        return math.isfinite(low) and math.isfinite(high) and (low <= high or low > qparams.NOTHING_SEEN)

    def is_degenerate(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it holds 0 and nothing else."""
        return state["min_val"].item() >= 0 >= state["max_val"].item()

    def describe(self, state: Mapping[str, Tensor]) -> str:
        """``[-0.42, 3.1]``, or ``unset``."""
        if not self.is_set(state):
            return UNSET
        if self.is_degenerate(state):
            return "[0, 0]"
        return f"[{state['min_val'].item():.4g}, {state['max_val'].item():.4g}]"

    def as_written_today(self, state: Mapping[str, Tensor], format: Format) -> dict[str, Tensor]:
        """Of a range of zeros only, too, which was [0, 0]; what an average left of "unset" at one bound is 0."""
        state = super().as_written_today(state, format)
        low, high = state["min_val"], state["max_val"]
        zeros, wide = (low == 0) & (high == 0), low < high
        near = {"min_val": low.clamp(min=qparams.ONLY_ZEROS), "max_val": high.clamp(max=-qparams.ONLY_ZEROS)}
        found = {}
        for name, empty in near.items():
            value = torch.where(wide & (state[name].abs() <= qparams.ONLY_ZEROS), 0.0, state[name])
            found[name] = torch.where(zeros, empty, value)
        return found

    def start_calibration(self, state: Mapping[str, Tensor]) -> None:
        """Empties it."""
        state["min_val"].fill_(qparams.NOTHING_SEEN)
        state["max_val"].fill_(-qparams.NOTHING_SEEN)

    def set_ends(self, state: Mapping[str, Tensor], format: Format, low: float, high: float) -> None:
        """The two numbers; of 0 and 0, the state of zeros only."""
        only_zeros = low == high == 0
        state["min_val"].fill_(qparams.ONLY_ZEROS if only_zeros else low)
        state["max_val"].fill_(-qparams.ONLY_ZEROS if only_zeros else high)

    def ends(self, state: Mapping[str, Tensor], format: Format) -> tuple[float, float]:
        """The two numbers."""
        return state["min_val"].item(), state["max_val"].item()

    def follow(self, state: Mapping[str, Tensor], format: Format, low: float, high: float) -> bool:
        """Multiplies both; one of zeros only stays."""
        if not self.is_degenerate(state):
            state["min_val"].mul_(low)
            state["max_val"].mul_(high)
        return True

    def mode(self, observing: bool, resolved: bool) -> Mode:
        """TRAIN or, delayed, DELAYED; FIRST while it may be unset."""
        if observing and not self.delayed:
            return Mode.TRAIN
        if observing:
            return Mode.DELAYED if resolved else Mode.FIRST
        return Mode.STATIC if resolved else Mode.RESOLVE

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams | None:
        """``affine_qparams(min, max)`` of the range as the mode says: stored, resolved, or updated first."""
        low, high = self._range(site, value)
        return None if site.mode.calibrates else affine_qparams(site, low, high)

    def _range(self, site: SiteGraph, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        low, high = site.state["min_val"], site.state["max_val"]
        if site.mode in (Mode.STATIC, Mode.DELAYED):
            return low, high
        if site.mode in (Mode.RESOLVE, Mode.FIRST):
            return site.pair(qparams.RESOLVE_MIN_MAX, value, low, high)
        if site.mode in (Mode.TRAIN, Mode.OBSERVE) and site.across_ranks:
            return self._average(site, value)
        if site.mode is Mode.EXTEND:
            new = site.pair(qparams.EXTEND_MIN_MAX, value, low, high)
        else:
            new = site.pair(qparams.UPDATE_MIN_MAX, value, low, high, self.constant)
        site.store(min_val=new[0], max_val=new[1])
        return new

    def observe(self, site: SiteGraph, value: fx.Node) -> None:
        """The update, in a form that `BatchRangeUpdates` moves to the end of the graph."""
        self._average(site, value)

    def _average(self, site: SiteGraph, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        extremes = site.extremes(value)
        state = site.state["min_val"], site.state["max_val"]
        average = site.call(qparams.AVERAGE_MIN_MAX, *extremes, *state, self.constant)
        site.defer(average)
        new = site.item(average, 0), site.item(average, 1)
        site.store(min_val=new[0], max_val=new[1])
        return new
