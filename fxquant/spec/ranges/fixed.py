"""`Fixed`: a range known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.errors import InvalidArgument
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.site_graph import Qparams, SiteGraph, affine_qparams


@dataclass(frozen=True, kw_only=True)
class Fixed(Range):
    """A range known beforehand, as after a ReLU6."""

    kind: ClassVar[str] = "fixed"
    min: float
    max: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min) and math.isfinite(self.max) and self.min < self.max):
            raise InvalidArgument(f"Fixed range must be finite with min < max: got [{self.min}, {self.max}].")

    def suffix(self) -> str:
        """``[0, 6]``."""
        return f"[{self.min:g}, {self.max:g}]"

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams:
        """``affine_qparams(min, max)`` of the two numbers."""
        return affine_qparams(site, site.constant(self.min), site.constant(self.max))
