"""Timing runs that take turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fxquant.errors import InvalidArgument

_WARM = 3


_FINE = 1e-6  # seconds


def clock_of(threads: int) -> str:
    """``"CPU time"``, which other processes do not lengthen, of one thread where the system counts it finely.

    Else ``"wall time"``: of several threads the one that is waited for is what counts.
    """
    return "CPU time" if threads == 1 and time.get_clock_info("process_time").resolution <= _FINE else "wall time"


def in_turns(runs: Mapping[str, Callable[[], Any]], *, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after three that do not count; the order turns with the rounds.

    By the clock that `clock_of` names. Raises ``InvalidArgument`` for ``rounds`` below 1.
    """
    now = time.process_time if clock_of(threads) == "CPU time" else time.perf_counter
    if rounds < 1:
        raise InvalidArgument(f"rounds must be at least 1: got {rounds}.")
    for run in runs.values():
        for _ in range(_WARM):
            run()
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for _ in range(rounds):
        for key in order:
            start = now()
            runs[key]()
            seconds[key].append(now() - start)
        order = order[1:] + order[:1]
    return seconds
