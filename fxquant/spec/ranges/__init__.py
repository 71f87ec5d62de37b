"""How a quantizer's scale is found: one kind of range a file, and what every kind has to say of itself."""

from fxquant.spec.ranges.base import RANGE_KINDS, Range
from fxquant.spec.ranges.current_tensor import CurrentTensor
from fxquant.spec.ranges.fixed import Fixed
from fxquant.spec.ranges.learned import Learned
from fxquant.spec.ranges.moving_average import MovingAverage
from fxquant.spec.ranges.named import RANGES, get_range
from fxquant.spec.ranges.site_graph import Format, Qparams, SiteGraph, affine_qparams

__all__ = [
    "RANGES",
    "RANGE_KINDS",
    "CurrentTensor",
    "Fixed",
    "Format",
    "Learned",
    "MovingAverage",
    "Qparams",
    "Range",
    "SiteGraph",
    "affine_qparams",
    "get_range",
]
