"""Now `fxquant.prepared.override`."""

from fxquant.prepared.override import override

__all__ = ["override"]
