"""`Mode`: what a site does in a compiled graph."""

from __future__ import annotations

import enum


class Mode(enum.IntEnum):
    """What a site does in a compiled graph; part of the guards, so changing it recompiles.

    OFF leaves the tensor float; STATIC quantizes with the stored range; RESOLVE does too, but takes the tensor's
    own range where none is stored; TRAIN updates the range first; EXTEND and FOLLOW only observe, for
    calibration by extremes and by moving average. DELAYED quantizes with the stored range and updates it afterwards;
    FIRST does too, but takes the tensor's own range where none is stored. OBSERVE updates the range as training does,
    over all ranks where there are more, and leaves the tensor float.
    """

    OFF = 0
    STATIC = 1
    RESOLVE = 2
    TRAIN = 3
    EXTEND = 4
    FOLLOW = 5
    DELAYED = 6
    FIRST = 7
    OBSERVE = 8

    @property
    def calibrates(self) -> bool:
        """Whether the site only observes: the tensor stays float."""
        return self in (Mode.EXTEND, Mode.FOLLOW, Mode.OBSERVE)

    @property
    def updates_afterwards(self) -> bool:
        """Whether the range is updated when the tensor has been quantized."""
        return self in (Mode.DELAYED, Mode.FIRST)
