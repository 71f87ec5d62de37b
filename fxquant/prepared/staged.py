"""What a stage of a training makes of the sites of a prepared model: what each does, and in which format."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A range whose site got other bits: its state before and after, by which that can be undone."""

    quantizer: Quantizer
    spec: QuantSpec
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @torch.no_grad()
    def undo(self) -> None:
        """Puts format and state back, where the state is still what was made of it."""
        state = self.quantizer.state
        if all(torch.equal(state[name], value) for name, value in self.after.items()):
            self.quantizer.site = dataclasses.replace(self.quantizer.site, spec=self.spec)
            for name, value in self.before.items():
                state[name].copy_(value)


def stage_sites(model: nn.Module, wanted: Mapping[str, Staged], *, entering: bool) -> list[Converted]:
    """Has each site do as ``wanted`` says, by the plan's key; returns what became of ranges that depend on bits.

    Graphs whose sites do something else are compiled anew at their next call. ``entering``: training got here step by
    step. A site that then begins to observe and has no range starts one, and what it has observed is taken over as it
    stops; else the state is that of a checkpoint.
    """
    held, converted = planned_quantizers(model), []
    for key, staged in wanted.items():
        _, quantizer = held[without_wrappers(key)]
        before, quantizer.doing = quantizer.doing, staged.doing
        if entering and quantizer.stateful and "observe" in (before, staged.doing) and before != staged.doing:
            _begin_or_end(quantizer)
        if quantizer.spec != staged.spec:
            converted += _convert(quantizer, staged.spec)
        quantizer.settle()
    for bound in bound_forwards(model).values():
        bound.take_formats()
    return converted


@torch.no_grad()
def _begin_or_end(quantizer: Quantizer) -> None:
    if quantizer.doing != "observe":
        if quantizer.is_set():
            quantizer.range.end_calibration(quantizer.state)
    elif not quantizer.is_set():
        quantizer.range.start_calibration(quantizer.state)


@torch.no_grad()
def _convert(quantizer: Quantizer, spec: QuantSpec) -> list[Converted]:
    """Gives a quantizer another format, and its range the state that is the same range in codes of that."""
    was, before = quantizer.spec, {name: value.detach().clone() for name, value in quantizer.state.items()}
    found = quantizer.range.converted(before, was, spec)
    quantizer.site = dataclasses.replace(quantizer.site, spec=spec)
    if found is None:  # nothing was seen
        return []
    for name, value in quantizer.state.items():
        value.copy_(found[name])
    after = {name: value.detach().clone() for name, value in quantizer.state.items()}
    return [Converted(quantizer=quantizer, spec=was, before=before, after=after)]


@contextlib.contextmanager
def all_quantized(model: nn.Module) -> Iterator[None]:
    """Inside, sites that a stage leaves float are quantized, too."""
    before = [(quantizer, quantizer.doing) for _, quantizer in planned_quantizers(model).values()]
    try:
        for quantizer, _ in before:
            quantizer.doing = "quantize"
        yield
    finally:
        for quantizer, doing in before:
            quantizer.doing = doing


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
