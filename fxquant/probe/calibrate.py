"""Post-training calibration: ranges from data, without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxquant.backend.entry import fxquant_eager
from fxquant.capture.aside import compiled_aside, evaluating
from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.prepared.quantizer import Quantizer, quantizers
from fxquant.prepared.root import require_plan, unwrap
from fxquant.spec.mode import Mode
from fxquant.support.progress import track

M = TypeVar("M", bound=nn.Module)
Method = Literal["max", "moving_average"]
_MODES = {"max": Mode.EXTEND, "moving_average": Mode.FOLLOW}


def calibrate(model: M, data: Iterable[Any], *, method: Method = "max", progress: bool = True) -> M:
    """Sets every activation range of a prepared model from ``data``, evaluated in float; returns the model.

    Args:
        data: batches; each a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        method: ``"max"`` spans the extremes of everything seen; ``"moving_average"`` follows the batches as
            training does.
        progress: draw a bar on a terminal.

    What was in the ranges before is forgotten, but for sites that the batches did not run, which a warning names;
    after an error all of it is back. BatchNorm statistics, modes and weights
    stay. Raises InvalidArgument for an unprepared model, no data, or an unknown method.
    """
    require_plan(model, "calibrate")
    if method not in _MODES:
        raise InvalidArgument(f"method must be one of {', '.join(map(repr, _MODES))}: got {method!r}.")
    plain = unwrap(model)
    ranged = [(key, q) for key, q in quantizers(plain) if q.stateful]
    kept = [({name: value.detach().clone() for name, value in q.state.items()}, q.resolved) for _, q in ranged]
    try:
        batches = _observe(plain, data, _MODES[method], progress)
        if not batches:
            raise InvalidArgument("data must hold at least one batch: got none.")
    except BaseException:
        for (_, q), (state, resolved) in zip(ranged, kept, strict=True):
            _write(q, state)
            q.resolved = resolved
        raise
    with torch.no_grad():
        for _, q in ranged:
            q.range.end_calibration(q.state)
    unseen = [(key, q, before) for (key, q), before in zip(ranged, kept, strict=True) if not q.settle()]
    for _, q, (state, _) in unseen:
        _write(q, state)
    holding = sum(q.settle() for _, q, _ in unseen)
    if unseen:
        keep = f" {holding} of them keep the ranges that they had." if holding else ""
        warnings.warn(
            f"{len(unseen)} sites saw no data in calibration: {', '.join(key for key, _, _ in unseen[:5])}. "
            f"The batches did not run them.{keep}",
            NotQuantizedWarning,
            stacklevel=2,
        )
    return model


def _observe(model: nn.Module, data: Iterable[Any], mode: Mode, progress: bool) -> int:
    every = [q for _, q in quantizers(model)]
    for quantizer in every:
        _start(quantizer, mode)
    count = 0
    try:
        with evaluating(model), torch.no_grad(), compiled_aside(model, fxquant_eager) as step:
            for batch in track(data, "calibrating", show=progress):
                args, kwargs = batch_arguments(batch)
                step(*args, **kwargs)
                count += 1
    finally:
        for quantizer in every:
            quantizer.calibrating = None
    return count


@torch.no_grad()
def _start(quantizer: Quantizer, mode: Mode) -> None:
    quantizer.calibrating = mode
    if quantizer.stateful:
        quantizer.resolved = False
        quantizer.range.start_calibration(quantizer.state)


@torch.no_grad()
def _write(quantizer: Quantizer, state: dict[str, Tensor]) -> None:
    for name, value in quantizer.state.items():
        value.copy_(state[name])


def batch_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise InvalidArgument(
        f"each batch of data must be a tensor, a tuple of arguments or a mapping: got {type(batch).__name__}."
    )
