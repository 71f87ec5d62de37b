"""Times of files that ran in turns, and what may be said of them in spite of noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_TO_SIGMA = 1.4826  # of the median of absolute deviations, for a normal distribution
_OF_MEDIAN = 1.2533  # the standard error of a median over that of a mean
_ERRORS = 2  # how many standard errors a gain must exceed


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One file beside a reference that ran in the same rounds.

    Attributes:
        reference, seconds: medians of a run.
        gain: median over the rounds of what the file's run took less than the reference's, in seconds.
        noise: what a gain must exceed to be believed: two standard errors of that median.
    """

    reference: float
    seconds: float
    gain: float
    noise: float

    @classmethod
    def of(cls, reference: Sequence[float], samples: Sequence[float]) -> Compared:
        """From seconds of each round."""
        gains = [before - after for before, after in zip(reference, samples, strict=True)]
        gain = statistics.median(gains)
        deviation = statistics.median(abs(each - gain) for each in gains)
        noise = _ERRORS * _OF_MEDIAN * _TO_SIGMA * deviation / math.sqrt(len(gains))
        return cls(
            reference=statistics.median(reference), seconds=statistics.median(samples), gain=gain, noise=noise
        )

    def is_faster(self, margin: float = 1.0) -> bool:
        """Whether the file is faster, by a factor, beyond the noise: by the median difference and by both medians."""
        slower = max(self.reference - self.gain, self.seconds)
        return self.gain > self.noise and self.reference > self.seconds and slower <= self.reference / margin

    @property
    def is_slower(self) -> bool:
        """Whether it is slower, beyond the noise."""
        return -self.gain > self.noise
