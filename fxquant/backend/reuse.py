"""Quantized weights that are kept from call to call of a compiled graph, and computed again once a weight has changed.

Autograd counts the changes of a tensor that it sees. It sees neither those that a fused optimizer makes nor any through
``p.data``, so behind a step of an optimizer all that was computed from its parameters is dropped. A write through
``p.data`` by anything else goes unseen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef  # tried on 2.13 and 2.15
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.backend.reports import log_of
from fxquant.passes.base import Decline, PassResult
from fxquant.passes.captured.split_weights import Part, Parts, SplitWeights

Compiled = Callable[..., Any]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


class _Stamp:
    """A tensor and its contents at a time. Holds neither: the storage's address is not given away meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = tensor.data_ptr()
        self.version = tensor._version

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, and unchanged as far as autograd knows."""
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.place == tensor.data_ptr()
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


class _Kept:
    """Values of a part, and the tensors that they were computed from."""

    def __init__(self, stamps: Sequence[_Stamp], values: tuple[Tensor, ...]) -> None:
        self.stamps = stamps
        self.values = values

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the values are those of ``tensors`` now."""
        return all(stamp.is_of(tensor) for stamp, tensor in zip(self.stamps, tensors, strict=True))

    def is_from(self, ids: set[int]) -> bool:
        """Whether one of the tensors has one of these ids."""
        return any(id(stamp.tensor()) in ids for stamp in self.stamps)


class Store:
    """Values of one part for each set of tensors: a compiled graph serves every instance of a class.

    Graphs with the same part, as those of training and evaluation, have one store. What belongs to tensors that are
    gone goes with them. ``runs`` counts computations.
    """

    def __init__(self) -> None:
        self.held: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.runs = 0

    def values(self, tensors: Sequence[Tensor], compute: Compiled) -> tuple[Tensor, ...]:
        """``compute(*tensors)``, or what it gave before. Without gradient."""
        kept: _Kept | None = self.held.get(tensors[0])
        if any(tensor.is_inference() for tensor in tensors):  # their changes are not counted
            kept, stamps = None, None
        else:
            if kept is not None and kept.is_of(tensors):
                return kept.values
            stamps = [_Stamp(tensor) for tensor in tensors]
        del kept
        self.held.pop(tensors[0], None)  # freed before the new ones are made
        self.runs += 1
        with torch.inference_mode(False), torch.no_grad():
            values = tuple(compute(*tensors))
        if stamps is not None:
            self.held[tensors[0]] = _Kept(stamps, values)
        return values

    def forget(self, ids: set[int]) -> None:
        """Drops what was computed from tensors with these ids."""
        for tensor, kept in list(self.held.items()):
            if kept.is_from(ids):
                self.held.pop(tensor, None)


_STORES: weakref.WeakValueDictionary[object, Store] = weakref.WeakValueDictionary()


def stores() -> tuple[Store, ...]:
    """Those of the compiled graphs that are alive."""
    return tuple(_STORES.values())


def reuse_weights(
    gm: fx.GraphModule, inputs: Sequence[Any], *, whole: Compile, part: Compile, backend: str
) -> tuple[Compiled, PassResult]:
    """The graph compiled by ``whole``, its quantized weights by ``part``, called only if a weight has changed.

    ``gm`` is changed. Left alone, with a decline, are weights that depend on more than parameters and buffers
    (`SplitWeights`), and all in a distributed process. ``result.rewrites`` counts the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        result = PassResult()
        reason = "torch.distributed is initialized: weights that are gathered anew are not told from those before"
        result.declines.append(Decline(pass_name="reuse_weights", node="graph", reason=reason))
        return whole(gm, inputs), result
    result = SplitWeights(inputs=tuple(inputs)).run(gm)
    parts = result.product(Parts).parts
    if not parts:
        return whole(gm, inputs), result
    _watch_optimizers()
    runs = tuple(_run_of(each, [inputs[i] for i in each.positions], part, backend) for each in parts)
    fakes = [fake for each in parts for fake in each.fakes]
    compiled = whole(gm, [*inputs, *fakes])

    def run(*given: Any) -> Any:
        return compiled(*given, *(value for each in runs for value in each(given)))

    return run, result


def _run_of(part: Part, inputs: Sequence[Tensor], compile_part: Compile, backend: str) -> Compiled:
    store = _STORES.setdefault(_key(part, inputs, backend), Store())
    with torch.no_grad():
        compute = compile_part(part.gm, inputs)

    def run(given: Sequence[Any]) -> tuple[Tensor, ...]:
        return store.values([given[i] for i in part.positions], compute)

    return run


def _key(part: Part, inputs: Sequence[Tensor], backend: str) -> object:
    """Equal for parts that compute the same of the same tensors."""
    forms = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs)
    kinds = sorted({t.device.type for t in inputs})
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return backend, part.gm.code, forms, autocast


@functools.cache
def _watch_optimizers() -> RemovableHandle:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    return register_optimizer_step_post_hook(_forget_stepped)


def unwatch_optimizers() -> None:
    """Takes the hook away, until the next graph that keeps weights; those that live go stale with the next step."""
    _watch_optimizers().remove()
    _watch_optimizers.cache_clear()


def _forget_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _STORES:
        return  # a compiled step counts its changes
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for store in stores():
        store.forget(stepped)


def reused(
    quantized: fx.GraphModule, example_inputs: Sequence[Any], whole: Compile, part: Compile, backend: str
) -> Callable[..., Any]:
    compiled, result = reuse_weights(quantized, example_inputs, whole=whole, part=part, backend=backend)
    log_of(quantized).add(result.declines, reused=result.rewrites)
    return compiled
