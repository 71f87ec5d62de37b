"""How far the result of a quantized run is from the float model's, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.probe.calibrate import batch_arguments

Loss = Callable[[Any, Any], Any]  # (output, target) → one number


def parts(batch: Any, loss: Loss | None) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """Arguments and target of one batch; InvalidArgument where a loss is given and the batch is no pair."""
    if loss is None:
        return batch_arguments(batch), None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InvalidArgument(
            f"each batch of data must be a pair (arguments, target) where a loss is given: "
            f"got {type(batch).__name__}{size}."
        )
    return batch_arguments(batch[0]), batch[1]


class ErrorMeter:
    """Squared distance from the float outputs of one batch, where those are finite.

    ``total`` is the squared norm of the float outputs.
    """

    float_loss = 0.0

    def __init__(self, reference: Any) -> None:
        self.reference = _floats(reference)
        if not self.reference:
            raise InvalidArgument(
                "model must return a floating-point tensor where no loss is given: got "
                f"{type(reference).__name__} without one. Pass loss=."
            )
        finite = [y.isfinite() for y in self.reference]
        self.finite = [None if mask.all() else mask for mask in finite]
        self.total = sum(map(_square_sum, self.reference, self.finite))

    def cost(self, output: Any) -> float:
        """``Σ (y − y₀)²``; NaN counts as infinite."""
        pairs = zip(_floats(output), self.reference, self.finite, strict=True)
        distance = sum(_square_sum(_wide(y) - _wide(y0), mask) for y, y0, mask in pairs)
        return math.inf if math.isnan(distance) else distance


class LossMeter:
    """Increase of the loss over the float run of one batch; ``total`` is 1, since the mean over batches counts."""

    total = 1.0

    def __init__(self, loss: Loss, reference: Any, target: Any) -> None:
        self.loss, self.target = loss, target
        self.float_loss = self._number(reference)
        if not math.isfinite(self.float_loss):
            raise InvalidArgument(f"loss must be finite for the float model: got {self.float_loss}.")

    def cost(self, output: Any) -> float:
        """``loss(y) − loss(y₀)``; NaN counts as infinite."""
        increase = self._number(output) - self.float_loss
        return math.inf if math.isnan(increase) else increase

    def _number(self, output: Any) -> float:
        value = self.loss(output, self.target)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidArgument(f"loss must give one number: got a tensor of shape {tuple(value.shape)}.")
        return float(value)


def _square_sum(x: Tensor, where: Tensor | None) -> float:
    """Summed in float64, but not copied to it: the logits of a language model are large."""
    return float((_wide(x) if where is None else _wide(x)[where]).square().sum(dtype=torch.float64))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floats(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)  # private; tried on 2.13 and 2.15
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
