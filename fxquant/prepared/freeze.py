"""`freeze_ranges` and `freeze_batch_norm`: what training holds from some step on."""

from __future__ import annotations

from torch import nn

from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan, unwrap


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Holds every activation range where it is, in training too; ``frozen=False`` lets them follow the data again."""
    require_plan(model, "freeze_ranges")
    for _, quantizer in quantizers(unwrap(model)):
        quantizer.observing = not frozen
        quantizer.settle()


class _FrozenTrain:
    """A BatchNorm's ``train`` that leaves it in eval mode: running statistics are used and kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, False)


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Normalizes with running statistics from now on, also in training; weight and bias keep training.

    QAT then trains exactly the folded network that is deployed. Survives ``model.train()``; ``frozen=False``
    gives every BatchNorm its model's mode back.
    """
    model = unwrap(model)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if frozen:
            module.__dict__["train"] = _FrozenTrain(module)
            module.eval()
        elif isinstance(module.__dict__.get("train"), _FrozenTrain):
            del module.__dict__["train"]
            module.train(model.training)
