"""What training holds where it is, as flags in state dicts: ranges of sites, statistics of BatchNorm modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.errors import PlanMismatch
from fxquant.graph.frames import without_wrappers
from fxquant.plan.plan import Site
from fxquant.prepared.quantizer import Quantizer, planned_quantizers
from fxquant.spec.quant_spec import QuantSpec


class FrozenTrain:
    """A BatchNorm's ``train`` that leaves it in eval mode: running statistics are used and kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, False)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every BatchNorm of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def hold_statistics(module: nn.Module, frozen: bool, training: bool) -> None:
    """Freezes one BatchNorm, or gives one that is frozen the mode ``training`` back."""
    if frozen:
        module.__dict__["train"] = FrozenTrain(module)
        module.eval()
    elif _is_held(module):
        del module.__dict__["train"]
        module.train(training)


def frozen_flags(model: nn.Module, sites: Sequence[Site]) -> Tensor:
    """uint8 of 0 and 1: whether each site's range is frozen, then each BatchNorm.

    Of a site that has another number of bits than planned, in a stage of a schedule, twice that number is added: what
    its range keeps is for codes of that width.
    """
    held = planned_quantizers(model)
    found = [(site, held.get(without_wrappers(site.key))) for site in sites]
    ranges = [0 if now is None else _flag(site, now[1]) for site, now in found]
    return torch.tensor([*ranges, *map(_is_held, batch_norms(model))], dtype=torch.uint8)


def _flag(site: Site, quantizer: Quantizer) -> int:
    bits = quantizer.spec.bits
    return (not quantizer.observing) + 2 * (bits if bits != site.local.spec.bits else 0)


def freeze_as(model: nn.Module, sites: Sequence[Site], flags: Sequence[int]) -> None:
    """Freezes and releases, and sets bits, as `frozen_flags` of a model with these sites says.

    Raises PlanMismatch for other counts, and for bits that a site cannot have.
    """
    norms = batch_norms(model)
    if len(flags) != len(sites) + len(norms):
        raise PlanMismatch(
            f"checkpoint must say of each site and BatchNorm whether it is frozen: got {len(flags)} flags for "
            f"{len(sites)} sites and {len(norms)} BatchNorm modules. Load it into the model that it was saved from."
        )
    held = planned_quantizers(model)
    specs = [_of_bits(site, flag >> 1) for site, flag in zip(sites, flags, strict=False)]
    for site, spec, flag in zip(sites, specs, flags, strict=False):
        now = held.get(without_wrappers(site.key))
        if now is not None:
            now[1].let_move(not flag & 1)
            now[1].site = dataclasses.replace(now[1].site, spec=spec)
    for module, frozen in zip(norms, flags[len(sites) :], strict=True):
        if frozen != _is_held(module):
            hold_statistics(module, bool(frozen), model.training)


def _of_bits(site: Site, bits: int) -> QuantSpec:
    spec = site.local.spec
    if bits and not (spec.bits < bits <= 16 and spec.element is None):
        raise PlanMismatch(
            f"checkpoint must have sites of planned bits or more: got {bits} bits for {site.key}, which is {spec}. "
            "Load a checkpoint that fxquant saved."
        )
    return dataclasses.replace(spec, bits=bits) if bits else spec


def _is_held(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("train"), FrozenTrain)
