"""Times on a device, how long a run may still take, and what it has to say.

A timing on CUDA is taken between two events. Before the first of them the L2 cache is overwritten, and the device is
given something to wait for, so that the host has sent the whole call by the time the device comes to it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

_HEAD_START = 1_000_000  # clock cycles: half a millisecond and more


class Clock:
    """Medians of calls that take turns, on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache: torch.Tensor | None = None
        if device == "cuda":
            large = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.cache = torch.empty(max(large, 2**26), dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, calls: Mapping[str, Call], *, rounds: int, warmups: int) -> dict[str, float]:
        """Median seconds of each call with a cold cache: for single kernels."""
        return self._medians(calls, self._cold, rounds, warmups)

    def step_seconds(self, calls: Mapping[str, Call], *, rounds: int, warmups: int) -> dict[str, float]:
        """The same for calls that are long, from an idle device: what the host does in between is counted."""
        return self._medians(calls, self._idle, rounds, warmups)

    def _medians(
        self, calls: Mapping[str, Call], one: Callable[[Call], float], rounds: int, warmups: int
    ) -> dict[str, float]:
        for call in calls.values():
            for _ in range(warmups):
                call()
        self.synchronize()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(one(call))
        return {name: statistics.median(values) for name, values in times.items()}

    def _cold(self, call: Call) -> float:
        if self.cache is None:
            return _passed(call)
        self.cache.zero_()
        torch.cuda._sleep(_HEAD_START)  # private; tried on 2.11 and 2.13
        return self._between_events(call)

    def _idle(self, call: Call) -> float:
        if self.cache is None:
            return _passed(call)
        torch.cuda.synchronize()
        return self._between_events(call)

    @staticmethod
    def _between_events(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _passed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Budget:
    """Seconds that may pass, from when it was made."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.now = now
        self.started = now()

    @property
    def left(self) -> float:
        """Seconds that are left; negative behind the end."""
        return self.seconds - (self.now() - self.started)

    def part(self, share: float) -> Budget:
        """A budget of ``share`` of what is left, from now."""
        return Budget(max(self.left, 0.0) * share, self.now)


class Notes:
    """What is said on the way, on the standard error, and what failed: the exit status."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        """A line for whoever reads along."""
        print(text, file=sys.stderr, flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """Says in a line why something of ours is missing."""
        self.failed.append(what)
        self.say(f"failed: {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
