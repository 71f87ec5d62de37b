"""The ways to find activation ranges that have a name."""

from __future__ import annotations

from fxquant.errors import InvalidArgument
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.moving_average import MovingAverage

RANGES: dict[str, Range] = {"moving_average": MovingAverage(), "delayed": MovingAverage(delayed=True)}


def get_range(found: str | Range) -> Range:
    """The range of a name, or the range itself; InvalidArgument names the known ones."""
    if isinstance(found, Range):
        return found
    if not isinstance(found, str) or found not in RANGES:
        known = ", ".join(repr(name) for name in RANGES)
        raise InvalidArgument(
            f"ranges must be one of {known}, or a MovingAverage, CurrentTensor or Fixed: got {found!r}."
        )
    return RANGES[found]
