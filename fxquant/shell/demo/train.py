"""Training and evaluation, the same loop for float and quantized nets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.shell.demo.data import Digits, epoch

Forward = Callable[[Tensor], Tensor]

SMOOTHING = 0.05


def divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """The training loss: KL divergence from the smoothed labels to the prediction, mean over the batch, nats.

    That is label-smoothed cross entropy less the labels' own entropy, so a perfect fit is 0 and a curve on a
    logarithmic axis says something. The gradient is cross entropy's.
    """
    classes = logits.shape[1]
    rest = SMOOTHING / classes
    right = 1 - SMOOTHING + rest
    entropy = -right * math.log(right) - (classes - 1) * rest * math.log(rest)
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING) - entropy


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training set.
        learning_rate: the peak, reached after ``warmup`` of all steps and followed by a cosine to zero.
        warmup: the share of steps with a linearly rising rate.
        weight_decay: AdamW's, in units of the learning rate.
        frozen_epochs: the last epochs, before which ``freeze`` is called.
        steps_per_epoch: stop each epoch here; ``None`` runs all of it.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.05
    frozen_epochs: int = 0
    steps_per_epoch: int | None = None

    def steps(self, digits: Digits) -> int:
        """How many optimizer steps the whole schedule takes."""
        return self.epochs * self.epoch_length(digits)

    def epoch_length(self, digits: Digits) -> int:
        """How many optimizer steps one epoch takes."""
        full = len(digits.train_y) // len(digits.example)
        return full if self.steps_per_epoch is None else min(full, self.steps_per_epoch)

    def rate(self, step: int, total: int) -> float:
        """The learning rate at ``step``, as a share of the peak."""
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def train(
    model: nn.Module,
    forward: Forward,
    digits: Digits,
    schedule: Schedule,
    *,
    seed: int,
    advance: Callable[[float], None] = lambda loss: None,
    freeze: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train ``model`` through ``forward`` (itself or its compiled form); the mean loss of each epoch.

    ``advance`` is told each step's loss; ``freeze`` is called once, before the last ``frozen_epochs``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    total, length = schedule.steps(digits), schedule.epoch_length(digits)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, total))
    model.train()
    curve = []
    for index in range(schedule.epochs):
        if schedule.frozen_epochs and index == schedule.epochs - schedule.frozen_epochs:
            freeze()
        losses = []
        for _, (images, labels) in zip(range(length), epoch(digits, generator), strict=False):
            loss = divergence(forward(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
            advance(losses[-1])
        curve.append(sum(losses) / len(losses))
    return curve


@torch.no_grad()
def accuracy(model: nn.Module, forward: Forward, digits: Digits) -> float:
    """The share of held-out digits read correctly, in one batch, in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    try:
        return score(forward(digits.test_x), digits)
    finally:
        model.train(training)


def score(logits: Tensor, digits: Digits) -> float:
    """The share of held-out digits whose largest logit is the right class."""
    return float((logits.argmax(1) == digits.test_y).double().mean())
