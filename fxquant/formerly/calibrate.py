"""Now `fxquant.probe.calibrate`."""

from fxquant.probe.calibrate import calibrate

__all__ = ["calibrate"]
