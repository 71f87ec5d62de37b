"""`CurrentTensor`: the range of the tensor in hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from fxquant.ops import qparams
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.site_graph import Format, Qparams, SiteGraph, affine_qparams, of_element


@dataclass(frozen=True, kw_only=True)
class CurrentTensor(Range):
    """The range is that of the tensor in hand: weights, and activations of unprepared models."""

    kind: ClassVar[str] = "current"
    roles: ClassVar[frozenset[str]] = frozenset({"weight", "activation", "output"})
    per_group: ClassVar[bool] = True

    def describe(self, state: Mapping[str, Tensor]) -> str:
        """Where it is from."""
        return "of the tensor"

    def follow(self, state: Mapping[str, Tensor], format: Format, low: float, high: float) -> bool:
        """It does by itself."""
        return True

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams:
        """``max |w| / quant_max`` of a weight and of groups, ``affine_qparams(min, max)`` of a whole activation.

        Of tokens the latter too, each with its own extremes, where their zero point is not 0.
        """
        format = site.format
        named = of_element(format)
        if format.scale_format is not None:
            limits = (None, format.quant_max, format.scale_format)
            return Qparams(*site.pair(qparams.BLOCK_QPARAMS, value, *limits, **named))
        if site.axis is not None and not (format.signed and format.symmetric):
            return affine_qparams(site, *site.pair(qparams.CHANNEL_MIN_MAX, value, site.axis))
        if site.role == "weight" or site.axis is not None:
            return Qparams(*site.pair(qparams.SYMMETRIC_QPARAMS, value, site.axis, format.quant_max, **named))
        unset = site.constant(float("nan"))
        return affine_qparams(site, *site.pair(qparams.RESOLVE_MIN_MAX, value, unset, unset))
