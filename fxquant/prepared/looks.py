"""Looks on the host at ranges that compiled graphs read, after they have run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fxquant.errors import RangeNotSetWarning
from fxquant.prepared.bound_forward import BoundForward
from fxquant.prepared.live import LIVE
from fxquant.prepared.quantizer import Quantizer, quantizers
from fxquant.prepared.root import Root


def settle_after(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, and a look after each call whether delayed ranges that it read are set now.

    For graphs that take a tensor's own range where none is stored. The ranges that are set make Dynamo take another
    graph at the next call, in which no quantizer waits for its tensor's extremes.
    """

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        for _, quantizer in _unresolved(inputs):
            quantizer.settle(but_for_zeros=True)
        return outputs

    return run


def tell_of_unset(compiled: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """``compiled``, and after its first call a look whether it evaluated with ranges that no data has set.

    It took those of the tensors at hand, which no file has: a warning says so, once for each model. ``places`` are
    where its inputs hold ranges that it quantizes with: sites of training alone may stay unset.
    """
    looked = False

    def run(*inputs: Any) -> Any:
        nonlocal looked
        outputs = compiled(*inputs)
        if not looked:
            looked = True
            given = [inputs[place] for place in places]
            for root in {root for root, quantizer in _unresolved(given) if _lacks_data(quantizer)}:
                _warn(root)
        return outputs

    return run


def _unresolved(inputs: Sequence[Any]) -> Iterator[tuple[Root | None, Quantizer]]:
    """Quantizers whose state is among a graph's inputs and is not known to be set, with the roots of their models."""
    given = {id(value) for value in inputs if isinstance(value, Tensor)}
    for part in list(LIVE):
        if isinstance(part, BoundForward):
            for quantizer in part.quantizers():
                if not quantizer.resolved and id(quantizer.evidence) in given:
                    yield part.root, quantizer


def _lacks_data(quantizer: Quantizer) -> bool:
    return quantizer.is_on and quantizer.site.role != "weight" and not quantizer.is_set()


def _warn(root: Root | None) -> None:
    if root is None or root.told_unset:
        return
    root.told_unset = True
    unset = [key for key, quantizer in quantizers(root.module) if _lacks_data(quantizer)]
    more = f" and {len(unset) - 5} more" if len(unset) > 5 else ""
    warnings.warn(
        f"{len(unset)} activation ranges are set by no data yet: {', '.join(unset[:5])}{more}. They are quantized with "
        "the range of each batch, which no file has. Call fxquant.calibrate(model, data) first, or train.",
        RangeNotSetWarning,
        stacklevel=3,
    )
