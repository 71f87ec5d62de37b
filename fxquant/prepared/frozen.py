"""What training holds where it is, as flags in state dicts: ranges of sites, statistics of BatchNorm modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.errors import PlanMismatch
from fxquant.graph.frames import without_wrappers
from fxquant.prepared.quantizer import planned_quantizers


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


def frozen_flags(model: nn.Module, keys: Sequence[str]) -> Tensor:
    """uint8 of 0 and 1: whether each of the sites ``keys`` is frozen, then each BatchNorm."""
    held = planned_quantizers(model)
    found = [held.get(without_wrappers(key)) for key in keys]
    ranges = [now is not None and not now[1].observing for now in found]
    return torch.tensor([*ranges, *map(_is_held, batch_norms(model))], dtype=torch.uint8)


def freeze_as(model: nn.Module, keys: Sequence[str], flags: Sequence[int]) -> None:
    """Freezes and releases as `frozen_flags` of a model with the sites ``keys`` says; PlanMismatch for other counts."""
    norms = batch_norms(model)
    if len(flags) != len(keys) + len(norms):
        raise PlanMismatch(
            f"checkpoint must say of each site and BatchNorm whether it is frozen: got {len(flags)} flags for "
            f"{len(keys)} sites and {len(norms)} BatchNorm modules. Load it into the model that it was saved from."
        )
    held = planned_quantizers(model)
    for key, frozen in zip(keys, flags, strict=False):
        now = held.get(without_wrappers(key))
        if now is not None:
            now[1].let_move(not frozen)
    for module, frozen in zip(norms, flags[len(keys) :], strict=True):
        if frozen != _is_held(module):
            hold_statistics(module, bool(frozen), model.training)


def _is_held(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("train"), FrozenTrain)
