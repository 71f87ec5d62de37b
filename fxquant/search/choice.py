"""One option of each list, at the least cost within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fxquant.spec.quant_spec import QuantSpec

MOST_POINTS = 20_000  # of the frontier that the choice keeps: above, it is thinned


@dataclass(frozen=True)
class Option:
    """A format that one weight may get: what it costs the result, and what it takes from the budget."""

    spec: QuantSpec | None
    cost: float
    price: int


class _Point(NamedTuple):
    """The sums of one choice of options: the last of them, and the point that it was added to."""

    price: int
    cost: float
    last: Option | None = None
    before: _Point | None = None

    def plus(self, option: Option) -> _Point:
        return _Point(self.price + option.price, self.cost + option.cost, option, self)

    def options(self) -> list[Option]:
        chosen: list[Option] = []
        point: _Point | None = self
        while point is not None and point.last is not None:
            chosen.append(point.last)
            point = point.before
        return chosen[::-1]


def cheapest(options: Sequence[Sequence[Option]], budget: int, slack: float = 0.0) -> list[Option] | None:
    """One option of each list, with the summed price within budget; None if nothing is.

    Their summed cost is at most ``slack`` above the least one within budget, and of all such sums theirs has the
    least price. Of sums that neither cost nor price tells apart, the first is kept. Exact while at most `MOST_POINTS`
    sums are undominated; then the frontier is thinned, and the sum may be a little above the least.
    """
    least = [min(option.price for option in those) for those in options]
    points = [_Point(0, 0.0)]
    for index, those in enumerate(options):
        room = budget - sum(least[index + 1 :])
        grown = [point.plus(option) for point in points for option in those if point.price + option.price <= room]
        points = _undominated(grown)
        points = points[:: -(-len(points) // MOST_POINTS)] if points else []
    if not points:
        return None
    # Prices rise and costs fall along the frontier.
    return next(point for point in points if point.cost <= points[-1].cost + slack).options()


def _undominated(points: list[_Point]) -> list[_Point]:
    """Those that no other beats in price and cost, by rising price."""
    frontier: list[_Point] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not frontier or point.cost < frontier[-1].cost:
            frontier.append(point)
    return frontier
