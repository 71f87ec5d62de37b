"""What a stage of a training makes of the sites of a prepared model: what each does, and in which format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fxquant.graph.frames import without_wrappers
from fxquant.plan.plan import Plan
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import Doing, Quantizer, planned_quantizers
from fxquant.spec.quant_spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What one site does for a while. The plan, which checkpoints hold and the end of training comes back to, stays."""

    doing: Doing
    spec: QuantSpec


def stage_sites(model: nn.Module, wanted: Mapping[str, Staged], *, entering: bool) -> None:
    """Has each site do as ``wanted`` says, by the plan's key.

    Graphs whose sites do something else are compiled anew at their next call. ``entering``: training got here step by
    step. A site that then begins to observe and has no range starts one, and what it has observed is taken over as it
    stops; else the state is that of a checkpoint, which is left as it is.
    """
    held = planned_quantizers(model)
    for key, staged in wanted.items():
        _, quantizer = held[without_wrappers(key)]
        quantizer.site = dataclasses.replace(quantizer.site, spec=staged.spec)
        before, quantizer.doing = quantizer.doing, staged.doing
        if entering and quantizer.stateful and "observe" in (before, staged.doing) and before != staged.doing:
            _begin_or_end(quantizer)
        quantizer.settle()
    for bound in bound_forwards(model).values():
        bound.take_formats()


@torch.no_grad()
def _begin_or_end(quantizer: Quantizer) -> None:
    if quantizer.doing != "observe":
        if quantizer.is_set():
            quantizer.range.end_calibration(quantizer.state)
    elif not quantizer.is_set():
        quantizer.range.start_calibration(quantizer.state)


def off_plan(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Site key → what it does now, where that is not what the plan says: ``float``, ``observe``, another format."""
    held = planned_quantizers(model)
    found: dict[str, str] = {}
    for site in plan.sites:
        _, quantizer = held[without_wrappers(site.key)]
        if quantizer.doing != "quantize":
            found[site.key] = quantizer.doing
        elif quantizer.spec != site.local.spec:
            found[site.key] = str(quantizer.spec)
    return found
