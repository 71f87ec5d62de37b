"""Timing runs that take turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fxquant.errors import InvalidArgument

_WARM = 3


def in_turns(runs: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after three that do not count; the order turns with the rounds.

    Raises ``InvalidArgument`` for ``rounds`` below 1.
    """
    if rounds < 1:
        raise InvalidArgument(f"rounds must be at least 1: got {rounds}.")
    for run in runs.values():
        for _ in range(_WARM):
            run()
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for _ in range(rounds):
        for key in order:
            start = time.perf_counter()
            runs[key]()
            seconds[key].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return seconds
