"""How a quantizer's range is found, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fxquant.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Min and max follow the data in training: ``r ← r + constant·(batch − r)``, the first batch sets them.

    Updated before the batch is quantized (torch's MovingAverageMinMaxObserver). ``delayed``: after it, so that a step
    is quantized with the range that the step before left, the first with its own. No kernel then waits for the
    minimum and maximum of the tensor that it quantizes; the ranges that are kept are the same.
    """

    kind: ClassVar[str] = "moving_average"
    stateful: ClassVar[bool] = True
    constant: float = 0.01
    delayed: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.constant <= 1.0:
            raise InvalidArgument(f"MovingAverage.constant must be in (0, 1]: got {self.constant}.")


@dataclass(frozen=True, kw_only=True)
class CurrentTensor:
    """The range is that of the tensor in hand: weights, and activations of unprepared models."""

    kind: ClassVar[str] = "current"
    stateful: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A range known beforehand, as behind a ReLU6."""

    kind: ClassVar[str] = "fixed"
    stateful: ClassVar[bool] = False
    min: float
    max: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min) and math.isfinite(self.max) and self.min < self.max):
            raise InvalidArgument(f"Fixed range must be finite with min < max: got [{self.min}, {self.max}].")


Range = MovingAverage | CurrentTensor | Fixed
RANGE_KINDS: dict[str, type] = {cls.kind: cls for cls in (MovingAverage, CurrentTensor, Fixed)}
RANGES: dict[str, Range] = {"moving_average": MovingAverage(), "delayed": MovingAverage(delayed=True)}
"""The ways to find activation ranges that have a name."""


def get_range(found: str | Range) -> Range:
    """The range of a name, or the range itself; InvalidArgument names the known ones."""
    if isinstance(found, (MovingAverage, CurrentTensor, Fixed)):
        return found
    if not isinstance(found, str) or found not in RANGES:
        known = ", ".join(repr(name) for name in RANGES)
        raise InvalidArgument(
            f"ranges must be one of {known}, or a MovingAverage, CurrentTensor or Fixed: got {found!r}."
        )
    return RANGES[found]
