"""Distillation: a quantized student learns from a float teacher, which may be the student itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture.aside import evaluating, is_compiled
from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of, require_plan, unwrap
from fxquant.training.listener import Listener

__all__ = ["Distillation", "Distilled", "loss"]


class Distilled(NamedTuple):
    """What one call of a `Distillation` gives: the student's output, its loss, and the parts of that by name."""

    output: Any
    loss: Tensor
    parts: dict[str, Tensor]


def loss(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    kl: float = 1.0,
    temperature: float = 1.0,
    dim: int = -1,
    logits: Callable[[Any], Tensor] | None = None,
    features: Iterable[str] | Mapping[str, str] = (),
    feature_weight: float = 1.0,
) -> Distillation:
    """A loss that brings a quantized model's answers to a float one's, called as the model is.

    >>> distill = fxquant.distill.loss(step)
    >>> for x, y in batches:
    ...     output, loss, _ = distill(x)
    ...     (loss + cross_entropy(output, y)).backward()

    ``kl · T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over rows, plus ``feature_weight`` times the
    sum, over ``features``, of the mean squared difference of the outputs of a module. The teacher runs before the
    student, in eval mode and without gradient.

    Args:
        student: a prepared model that is compiled, in whole or in parts, or DistributedDataParallel around it.
        teacher: None for the student's float twin: the same weights, as they are in that step, with the quantizers off.
            That is no second copy of the weights, and one more graph; but it moves with the student, and alone holds
            nothing in its place: add a loss of the task. Or any module that is called as the student is:
            float, or prepared as the student is, and then run with its quantizers off.
        kl: factor of the divergence; 0 leaves it out.
        temperature: T.
        dim: the dimension of the classes.
        logits: takes them out of what the model returns; by default that is a tensor, or has ``logits``.
        features: paths of modules that return a tensor, or a mapping of the student's to the teacher's. Make the loss
            before the model's first compiled call: hooks are traced with the model, into the same graph. A module
            whose output a BatchNorm takes up is no longer folded into it; name one after that.
        feature_weight: factor of the features.

    Raises:
        InvalidArgument: a student that is not prepared or not compiled, paths that lead to no module, no loss at all.
        PlanMismatch: a teacher that is prepared otherwise.
    """
    return Distillation(student, teacher, _Kl(kl, temperature, dim, logits), features, feature_weight)


class Distillation:
    """A student, its teacher and what is compared: see `loss`, which makes it."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        kl: _Kl,
        features: Iterable[str] | Mapping[str, str],
        feature_weight: float,
    ) -> None:
        require_plan(student, "distill.loss")
        if not any(is_compiled(module) for module in student.modules()):
            raise InvalidArgument(
                f"student must be compiled: got {type(student).__name__}, which runs in float as it is. Give what "
                "torch.compile(model, backend='fxquant') returns, or call model.compile(backend='fxquant') first."
            )
        self.student = student
        self.teacher = None if teacher is None or unwrap(teacher) is unwrap(student) else teacher
        if self.teacher is not None:
            _check_teacher(self.teacher, student)
        pairs = dict(features) if isinstance(features, Mapping) else {path: path for path in features}
        if not (kl.factor or (pairs and feature_weight)):
            raise InvalidArgument("loss must compare something: got kl=0 and no features. Give one of the two.")
        self._kl, self._pairs, self._feature_weight = kl, pairs, feature_weight
        self._seen = Listener(unwrap(student), pairs.keys(), "student")
        self._taught = self._seen
        if self.teacher is not None:
            self._taught = Listener(unwrap(self.teacher), pairs.values(), "teacher")

    def __call__(self, *args: Any, **kwargs: Any) -> Distilled:
        """Runs the teacher, then the student, on one batch."""
        if torch.compiler.is_compiling():
            raise InvalidArgument(
                "distill.loss must be called outside of torch.compile, which is for the student alone."
            )
        teacher = self.student if self.teacher is None else self.teacher
        with torch.no_grad(), evaluating(teacher), _quantizers_off(teacher), self._taught.listening() as aims:
            aim = teacher(*args, **kwargs)
        with self._seen.listening() as found:
            output = self.student(*args, **kwargs)
        parts = {"kl": self._kl.factor * self._kl(output, aim)} if self._kl.factor else {}
        for mine, its in self._pairs.items():
            here = mine if self.teacher is None else its
            parts[mine] = self._feature_weight * _squared_difference(found[mine], aims[here], mine)
        return Distilled(output, torch.stack([part.float() for part in parts.values()]).sum(), parts)

    def close(self) -> None:
        """Takes the hooks of ``features`` off; the loss is of no use any more."""
        self._seen.close()
        self._taught.close()


class _Kl:
    """``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over rows."""

    def __init__(self, factor: float, temperature: float, dim: int, logits: Callable[[Any], Tensor] | None) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise InvalidArgument(f"temperature must be a finite number above 0: got {temperature!r}.")
        self.factor, self.temperature, self.dim, self.logits = factor, temperature, dim, logits

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        mine, its = self._rows(student), self._rows(teacher)
        if mine.shape != its.shape:
            raise InvalidArgument(
                f"teacher must answer in the student's form: got {tuple(its.shape)} and {tuple(mine.shape)}."
            )
        each = F.kl_div(mine, its, reduction="none", log_target=True).sum(self.dim)
        return each.mean() * self.temperature**2

    def _rows(self, output: Any) -> Tensor:
        found = self.logits(output) if self.logits is not None else _logits(output)
        return F.log_softmax(found.float() / self.temperature, self.dim)


def _logits(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise InvalidArgument(
            f"model must return a tensor, or something with logits: got {type(output).__name__}. "
            "Say where they are: logits=lambda output: output[0]."
        )
    return found


def _squared_difference(mine: Tensor, its: Tensor, path: str) -> Tensor:
    if mine.shape != its.shape:
        raise InvalidArgument(
            f"features must have one form in student and teacher: got {tuple(mine.shape)} and {tuple(its.shape)} of "
            f"{path!r}. Name modules of equal width."
        )
    return F.mse_loss(mine.float(), its.float())


def _check_teacher(teacher: nn.Module, student: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise InvalidArgument(f"teacher must be a module, or None for the float twin: got {type(teacher).__name__}.")
    plan = plan_of(unwrap(teacher))
    lines = plan.difference(require_plan(student, "distill.loss")) if plan is not None else []
    if lines:
        raise PlanMismatch(
            f"teacher must be a float model, or prepared as the student is: {len(lines)} sites differ "
            f"({'; '.join(line.replace('checkpoint', 'student') for line in lines[:3])}). Give the model before it was "
            "prepared, or fxquant.strip it."
        )


@contextlib.contextmanager
def _quantizers_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its float twin, compiled or not."""
    on = [quantizer for _, quantizer in quantizers(unwrap(model)) if quantizer.enabled]
    for quantizer in on:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enabled = True
