"""Two kinds of range that fxquant does not know: one with a rule of its own, one whose state is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fxquant.spec.mode import Mode
from fxquant.spec.ranges import Format, Qparams, Range, SiteGraph, affine_qparams

aten = torch.ops.aten


def amax(site: SiteGraph, value: fx.Node) -> fx.Node:
    """The greatest magnitude, of shape [1]."""
    return site.call(aten.reshape.default, site.call(aten.amax.default, site.call(aten.abs.default, value)), [1])


@dataclass(frozen=True, kw_only=True)
class Peak(Range):
    """``[−amax, amax]`` with ``amax ← max(decay · amax, max |x|)``."""

    kind: ClassVar[str] = "test.peak"
    state_names: ClassVar[tuple[str, ...]] = ("amax",)
    decay: float = 0.5

    def is_degenerate(self, state: Mapping[str, Tensor]) -> bool:
        return state["amax"].item() == 0

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams | None:
        reach = self._reach(site, value)
        return None if site.mode.calibrates else affine_qparams(site, site.call(aten.neg.default, reach), reach)

    def _reach(self, site: SiteGraph, value: fx.Node) -> fx.Node:
        known = site.state["amax"]
        if site.mode is Mode.STATIC:
            return known
        if site.mode is Mode.TRAIN:
            known = site.call(aten.mul.Tensor, known, self.decay)
        unset = site.call(aten.lt.Scalar, known, 0)
        seen = amax(site, value)
        if site.mode is Mode.RESOLVE:
            return site.call(aten.where.self, unset, seen, known)
        reach = site.call(aten.where.self, unset, seen, site.call(aten.maximum.default, known, seen))
        site.store(amax=reach)
        return reach


@dataclass(frozen=True, kw_only=True)
class Learned(Range):
    """``[−reach, reach]`` with a trained ``reach``; calibrated to the greatest magnitude, doubled at the end."""

    kind: ClassVar[str] = "test.learned"
    state_names: ClassVar[tuple[str, ...]] = ("reach",)
    start: float = 1.0

    def initial_state(self, format: Format, scales: int = 1) -> dict[str, Tensor]:
        return {"reach": nn.Parameter(torch.tensor([self.start]))}

    def describe(self, state: Mapping[str, Tensor]) -> str:
        return f"learned ±{state['reach'].item():.3g}"

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams | None:
        reach = site.state["reach"]
        if site.mode.calibrates:
            site.store(reach=site.call(aten.maximum.default, reach, amax(site, value)))
            return None
        codes = site.format
        scale = site.call(aten.mul.Tensor, reach, 2 / (codes.quant_max - codes.quant_min))
        middle = site.call(aten.to.dtype, site.constant((codes.quant_min + codes.quant_max + 1) // 2), torch.int32)
        return Qparams(scale, middle, float(site.mode is Mode.TRAIN))

    def start_calibration(self, state: Mapping[str, Tensor]) -> None:
        state["reach"].zero_()

    def end_calibration(self, state: Mapping[str, Tensor]) -> None:
        state["reach"].mul_(2)
