"""Post-training calibration: ranges from data, without training."""

from __future__ import annotations

import inspect
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
from fxquant.prepared.staged import all_quantized
from fxquant.probe import histograms
from fxquant.probe.visitor import Use, visiting
from fxquant.spec.mode import Mode
from fxquant.support.progress import track

M = TypeVar("M", bound=nn.Module)
Method = Literal["max", "minmax", "moving_average", "percentile", "entropy", "mse"]
_MODES = {"max": Mode.EXTEND, "minmax": Mode.EXTEND, "moving_average": Mode.FOLLOW}
_HISTOGRAMS: tuple[histograms.Method, ...] = ("percentile", "entropy", "mse")


def calibrate(
    model: M, data: Iterable[Any], *, method: Method = "max", percentile: float = 99.99, progress: bool = True
) -> M:
    """Sets every activation range of a prepared model from ``data``, evaluated in float; returns the model.

    Args:
        data: batches; each a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        method: ``"max"``, or ``"minmax"``, spans the extremes of everything seen; ``"moving_average"`` follows the
            batches as training does. Three more look at a histogram of each site's magnitudes and cut off what is
            rare, at one end a > 0: the range is [−a, a], but no wider than the extremes. ``"percentile"``: a is the
            lowest bin edge with ``percentile`` % of the magnitudes at or below it. ``"entropy"``: the one whose
            quantized histogram has the least Kullback-Leibler divergence from the clipped one (TensorRT's
            calibration). ``"mse"``: of k/256 of the largest magnitude the one of the least ``Σ (x − Q(x))²``, as the
            site's own format rounds.
        percentile: from 0 to 100, for the method of that name.
        progress: draw a bar on a terminal.

    What was in the ranges before is forgotten, but for sites that the batches did not run, which a warning names;
    after an error all of it is back. Scales of weights that are trained start from the weights, whatever the method.
    BatchNorm statistics, modes and weights
    stay; weights are made better by `fxquant.ptq`. Histograms take the same memory however much data there is. Raises
    InvalidArgument for an unprepared model, no data, an unknown method or a percentile that is none, and for
    histograms activations that are not finite, and formats and kinds of ranges that the method has no answer for.
    """
    require_plan(model, "calibrate")
    methods = (*_MODES, *_HISTOGRAMS)
    if method not in methods:
        raise InvalidArgument(f"method must be one of {', '.join(map(repr, methods))}: got {method!r}.")
    if not 0 < percentile <= 100:
        raise InvalidArgument(f"percentile must be above 0 and at most 100: got {percentile}.")
    plain = unwrap(model)
    ranged = [(key, q) for key, q in quantizers(plain) if q.stateful]
    for key, q in ranged if method in _HISTOGRAMS else ():
        if q.site.role == "weight":
            continue  # is in hand as a whole
        why = histograms.why_not(q.spec, method)
        if why is not None:
            raise InvalidArgument(f"method must be 'max' or 'moving_average' for {key}: got {method!r}, but {why}.")
    kept = [({name: value.detach().clone() for name, value in q.state.items()}, q.resolved) for _, q in ranged]
    odd: dict[int, bool] = {}
    try:
        if method in _HISTOGRAMS:
            batches = _collect(plain, data, method, percentile, progress)
        else:
            batches = _observe(plain, data, _MODES[method], progress, odd=odd)
        if not batches:
            raise InvalidArgument("data must hold at least one batch: got none.")
    except BaseException:
        for (_, q), (state, resolved) in zip(ranged, kept, strict=True):
            _write(q, state)
            q.resolved = resolved
        raise
    unseen = [(key, q, before) for (key, q), before in zip(ranged, kept, strict=True) if not q.settle()]
    for _, q, (state, _) in unseen:
        _write(q, state)
    holding = sum(q.settle() for _, q, _ in unseen)
    if told := _not_seen([key for key, _, _ in unseen], holding, odd) if unseen else _lost(odd, batches):
        warnings.warn(told, NotQuantizedWarning if unseen else UserWarning, stacklevel=2)
    return model


def _not_seen(keys: list[str], holding: int, odd: Mapping[int, bool]) -> str:
    """That sites have no range of these data, and why."""
    keep = f" {holding} of them keep the ranges that they had." if holding else ""
    why = "The batches did not run them."
    if odd:
        why = f"Batch {min(odd)} of data holds values that are not finite, and no range does: leave them out."
    return f"{len(keys)} sites saw no data in calibration: {', '.join(keys[:5])}. {why}{keep}"


def _lost(odd: Mapping[int, bool], batches: int) -> str:
    """That some batches counted for less than all of it; empty where none did."""
    lost = [number for number, is_lost in odd.items() if is_lost]
    if not lost:
        return ""
    return (
        f"{len(lost)} of {batches} batches of data hold NaN or +inf, the first of them batch {lost[0]}: tensors that "
        "are not finite with it have their ranges from the other batches."
    )


def observe_weights(model: nn.Module, batch: Any) -> None:
    """Starts the trained scales of weights anew, of what the weights are in a run of ``batch``; what it does not run
    keeps its own."""
    held = [q for _, q in quantizers(model) if q.stateful and q.site.role == "weight"]
    before = [{name: value.detach().clone() for name, value in q.state.items()} for q in held]
    if held:
        with all_quantized(model):
            _observe(model, [batch], Mode.EXTEND, False, held)
    for quantizer, state in zip(held, before, strict=True):
        if not quantizer.settle():
            _write(quantizer, state)
            quantizer.settle()


def _observe(
    model: nn.Module,
    data: Iterable[Any],
    mode: Mode,
    progress: bool,
    chosen: list[Quantizer] | None = None,
    odd: dict[int, bool] | None = None,
) -> int:
    """Runs the batches and returns how many.

    ``odd`` gets the numbers of those that are not finite, and whether by more than the −inf of masks.
    """
    every = [q for _, q in quantizers(model)] if chosen is None else chosen
    for quantizer in every:
        _start(quantizer, mode)
    count = 0
    try:
        with evaluating(model), torch.no_grad(), compiled_aside(model, fxquant_eager) as step:
            for batch in track(data, "calibrating", show=progress):
                args, kwargs = arguments_for(model, batch)
                step(*args, **kwargs)
                given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_float(leaf)]
                if odd is not None and not all(bool(leaf.isfinite().all()) for leaf in given):
                    odd[count] = not all(bool((leaf.isfinite() | leaf.isneginf()).all()) for leaf in given)
                count += 1
    finally:
        for quantizer in every:
            quantizer.calibrating = None
    with torch.no_grad():
        for quantizer in every:
            if quantizer.stateful:
                quantizer.range.end_calibration(quantizer.state)
    return count


def _collect(
    model: nn.Module, data: Iterable[Any], method: histograms.Method, percentile: float, progress: bool
) -> int:
    """A histogram of each site, then the range that it gives; sites that saw nothing become unset."""
    held = {key: q for key, q in quantizers(model) if q.stateful and q.site.role != "weight"}
    seen = {key: histograms.SiteHistogram(q.spec, method) for key, q in held.items()}

    def visit(use: Use) -> Tensor:
        for key in use.keys:
            if key in seen:
                try:
                    seen[key].collect(use.input)
                except InvalidArgument as error:
                    raise InvalidArgument(f"{error} That is the tensor of {key}.") from None
        return use.input

    count, first = 0, None
    with all_quantized(model), visiting(model, "calibrate") as run:
        for batch in track(data, "calibrating", show=progress):
            first = batch if first is None else first
            run(*arguments_for(model, batch), visit)
            count += 1
    if first is not None:
        observe_weights(model, first)
    with torch.no_grad():
        for key, quantizer in held.items():
            quantizer.range.start_calibration(quantizer.state)
            if not seen[key].is_empty:
                quantizer.range.set_ends(quantizer.state, quantizer.spec, *seen[key].ends(percentile))
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


def arguments_for(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with for a batch. Raises InvalidArgument where its forward does not take it."""
    args, kwargs = batch_arguments(batch)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the names {', '.join(kwargs)}" if kwargs else f"{len(args)} values"
        raise InvalidArgument(
            f"each batch of data must be what the model is called with: got {given}, and "
            f"{type(model).__name__}.forward takes ({', '.join(signature.parameters)}): {error}. "
            "Leave labels out: `((x,) for x, y in loader)`."
        ) from error
    return args, kwargs


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
