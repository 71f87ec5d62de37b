"""`freeze_ranges` and `freeze_batch_norm`: what training holds from some step on."""

from __future__ import annotations

from torch import nn

from fxquant.prepared.frozen import FrozenTrain as _FrozenTrain
from fxquant.prepared.frozen import batch_norms, hold_statistics
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan, unwrap

__all__ = ["_FrozenTrain", "freeze_batch_norm", "freeze_ranges"]  # pickles of version 0.1 name the private one


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Holds every range that is kept where it is, in training too; ``frozen=False`` lets them follow the data again.

    Parameters of learned ranges then require no gradient, and do again.

    Checkpoints hold it: a model is as frozen as the state dict that it loads says.
    """
    require_plan(model, "freeze_ranges")
    for _, quantizer in quantizers(unwrap(model)):
        quantizer.let_move(not frozen)
        quantizer.settle()


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Normalizes with running statistics from now on, also in training; weight and bias keep training.

    QAT then trains exactly the folded network that is deployed. Survives ``model.train()``, and checkpoints of a
    prepared model hold it; ``frozen=False`` gives every BatchNorm its model's mode back.
    """
    model = unwrap(model)
    for module in batch_norms(model):
        hold_statistics(module, frozen, model.training)
