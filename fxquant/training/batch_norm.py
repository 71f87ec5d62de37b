"""`reestimate_batch_norm`: running statistics of the quantized model, over given batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxquant.backend.entry import fxquant_eager
from fxquant.capture.aside import compiled_aside, evaluating
from fxquant.errors import InvalidArgument
from fxquant.prepared.frozen import batch_norms
from fxquant.prepared.root import require_plan, unwrap
from fxquant.probe.calibrate import arguments_for
from fxquant.support.progress import track

M = TypeVar("M", bound=nn.Module)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def reestimate_batch_norm(model: M, data: Iterable[Any], *, progress: bool = True) -> M:
    """Gives every BatchNorm of a prepared model the statistics that it sees with quantized weights; returns the model.

    Running averages lag behind weights that move from code to code. Here they become the mean, over the batches, of
    each batch's mean and unbiased variance, as a BatchNorm with ``momentum=None`` has them. The model runs as its
    quantizers are now, each BatchNorm normalizing by its batch, all else in eval mode; ranges, weights and modes stay,
    frozen statistics are replaced too. A BatchNorm behind a weight with one scale for the whole tensor gets the
    statistics that its training takes, those of the float weight.

    With ``torch.distributed``, give every rank the same batches.

    Args:
        model: prepared, maybe compiled; nothing that was compiled is compiled again for it.
        data: batches; each a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        progress: draw a bar on a terminal.

    Raises InvalidArgument for an unprepared model, one that keeps no running statistics, and for no data; the
    statistics are then, as after any error, what they were.
    """
    require_plan(model, "reestimate_batch_norm")
    plain = unwrap(model)
    norms = [norm for norm in batch_norms(plain) if isinstance(norm.running_mean, Tensor)]
    if not norms:
        raise InvalidArgument(
            f"model must have a BatchNorm with running statistics: got {type(plain).__name__}, which has none. "
            "Leave the re-estimation out."
        )
    kept = [[getattr(norm, name).clone() for name in _STATISTICS] for norm in norms]
    try:
        found, count = _measured(plain, norms, data, progress)
        if not count:
            raise InvalidArgument("data must hold at least one batch: got none.")
    except BaseException:
        _write(norms, kept)
        raise
    counted = torch.tensor(count)
    _write(norms, [[mean / count, variance / count, counted] for mean, variance in found])
    return model


def _measured(
    model: nn.Module, norms: list[nn.Module], data: Iterable[Any], progress: bool
) -> tuple[list[list[Tensor]], int]:
    """Sums, over batches, of the mean and variance that each BatchNorm saw, and how many batches there were."""
    sums = [[torch.zeros_like(value, dtype=torch.float64) for value in _mean_and_variance(norm)] for norm in norms]
    momenta, count = [norm.momentum for norm in norms], 0
    with evaluating(model), torch.no_grad(), compiled_aside(model, fxquant_eager) as step:
        try:
            for norm in norms:
                vars(norm).update(training=True, momentum=1.0)  # past `train`, which one that is frozen has of its own
            for batch in track(data, "re-estimating BatchNorm", show=progress):
                args, kwargs = arguments_for(model, batch)
                step(*args, **kwargs)
                for norm, those in zip(norms, sums, strict=True):
                    for total, value in zip(those, _mean_and_variance(norm), strict=True):
                        total += value
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                vars(norm).update(momentum=momentum)
    return sums, count


def _mean_and_variance(norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance


@torch.no_grad()
def _write(norms: list[nn.Module], values: list[list[Tensor]]) -> None:
    for norm, those in zip(norms, values, strict=True):
        for name, value in zip(_STATISTICS, those, strict=True):
            getattr(norm, name).copy_(value)
