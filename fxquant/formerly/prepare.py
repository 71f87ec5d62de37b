"""Now `fxquant.prepared`."""

from fxquant.prepared.attach import attach, detach
from fxquant.prepared.prepare import Measured, prepare, strip

__all__ = ["Measured", "attach", "detach", "prepare", "strip"]
