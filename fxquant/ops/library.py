"""The ``fxquant`` operator library and the one way an operator is put into it.

An operator is one pure function, its *arithmetic*. From it come the eager kernel (value checks first), the fake
implementation and the decomposition that Inductor fuses; a second pure function is its gradient.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxquant.ops.lowering_table import becomes
from fxquant.ops.metadata import Result, result_of

# Kept alive here: a Library that is collected unregisters its operators.
LIBRARY = torch.library.Library("fxquant", "DEF")

Arithmetic = Callable[..., Any]
# Gradient of a named set of arguments, from the arguments by name and one gradient per output.
Backward = Callable[..., Mapping[str, Tensor | None]]

ARITHMETIC: dict[OpOverload, Arithmetic] = {}
"""op → the function that it stands for, without value checks."""

DECOMPOSITIONS: dict[OpOverload, Arithmetic] = {}
"""The part of `ARITHMETIC` that a compiler takes apart as it traces; the rest stays a node for our passes."""


def define(
    schema: str,
    arithmetic: Arithmetic,
    *,
    check: Callable[..., None] | None = None,
    fake: Arithmetic | None = None,
    backward: Backward | None = None,
    saves: Sequence[str] | None = None,
    traced_as: Arithmetic | None = None,
    lift: Callable[..., Sequence[Any] | None] | None = None,
) -> OpOverload:
    """Registers ``schema`` for every device; returns its OpOverload.

    Args:
        schema: name, overload and signature. What receives a gradient must be positional.
        arithmetic: torch calls only, no host reads; static properties (shapes, dtypes, numbers) are checked here.
        check: called first with the same arguments by the eager kernel only, so it may read values.
        fake: shapes and dtypes; the arithmetic itself by default.
        backward: ``backward(arguments, *grads)`` → gradients by argument name; ``arguments`` has the op's arguments
            as attributes. Differentiable itself, as it is made of torch calls. Absent: no gradient.
        saves: the tensor arguments that ``backward`` reads; all by default.
        traced_as: what our compiler traces instead of the arithmetic, where it takes the op apart (`lowering_table`).
        lift: for torch.vmap over the first argument alone: its batch stands in front, ``lift(*args)`` gives the
            positional arguments that do the whole batch in one call, or None. Absent, None, or other arguments mapped:
            one call a sample.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if check is not None:
            check(*args, **kwargs)
        return arithmetic(*args, **kwargs)

    name = schema.split("(", 1)[0].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    eager = kernel if check is not None else arithmetic
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    if becomes(name, "eager", "cuda") == "kernel":
        LIBRARY.impl(name, _by_dispatch(name, eager), "CUDA")
    op = _operator(name)
    torch.library.register_fake(f"fxquant::{name}", _traced(op, _once(op, fake or arithmetic)), lib=LIBRARY)
    if backward is not None:
        _Gradient(op, backward, saves).register(name)
    torch.library.register_vmap(f"fxquant::{name}", _vmap_rule(op, lift), lib=LIBRARY)
    ARITHMETIC[op] = arithmetic
    if becomes(name, "aot") == "arithmetic":
        DECOMPOSITIONS[op] = traced_as or arithmetic
    return op


def _operator(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.fxquant, packet), overload or "default")
    return found


def _by_dispatch(name: str, aten: Arithmetic) -> Arithmetic:
    """The implementation for CUDA tensors. ``aten``, which checks first, has all calls that no kernel serves."""

    def run(*args: Any, **kwargs: Any) -> Any:
        from fxquant.kernels import dispatch  # not before a tensor on CUDA comes in

        return dispatch.take(name, aten, args, kwargs)

    return run


_known: dict[tuple[object, ...], Result] = {}
_MOST = 8192  # forms remembered: those of a few hundred models


def _once(op: OpOverload, fake: Arithmetic) -> Arithmetic:
    """``fake``, run once for operands of one form: size, stride, dtype, device, and the numbers.

    A fake-quant is a dozen operations, and a compile asks for the metadata of each site as often. torch's own cache of
    fake results is for its own operators. Operands of symbolic size, and lists, are asked for each time.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        form = tuple(_form(a) for a in (*args, *kwargs.values()))
        if None in form:
            return fake(*args, **kwargs)
        key = (op, torch.get_default_dtype(), tuple(kwargs), form)
        if key in _known:
            return _known[key].fresh()
        value = fake(*args, **kwargs)
        found = result_of(value)
        if found is not None and len(_known) < _MOST:
            _known[key] = found
        return value

    return run


_NUMBERS: tuple[type, ...] = (bool, int, float, str, type(None), torch.dtype)


def _form(value: Any) -> object:
    """What metadata of results can depend on; None where that is not known by sizes alone."""
    if isinstance(value, Tensor):
        sizes, strides = tuple(value.shape), value.stride() if value.layout is torch.strided else (None,)
        return (sizes, strides, value.dtype, value.device) if {*map(type, (*sizes, *strides))} <= {int} else None
    return (type(value), value) if type(value) in _NUMBERS else None


WHEN_TRACED: list[Callable[[], None]] = []
"""Called when Dynamo first meets an operator, and again at the first of a family that was imported later."""

_fused: set[OpOverload] = set()


def to_be_told_again() -> None:
    """As if Dynamo had met no operator yet."""
    _fused.clear()


def _traced(op: OpOverload, fake: Arithmetic) -> Arithmetic:
    """The fake implementation; the first time that Dynamo meets the op, it lets plain ``backend="inductor"`` fuse ours.

    Inductor's table of decompositions can only be extended once Inductor is loaded, which `import fxquant` must not
    do. Dynamo runs an op's fake implementation before Inductor reads the table. Families that are imported later
    come into the table at their own first time.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if op not in _fused and "torch._dynamo" in sys.modules:
            for tell in WHEN_TRACED:
                tell()
            _fused.update(ARITHMETIC)
        return fake(*args, **kwargs)

    return run


def _by_name(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    found = {argument.name: argument.default_value for argument in op._schema.arguments}
    found.update(zip(found, args, strict=False))
    return {**found, **kwargs}


def _vmap_rule(op: OpOverload, lift: Callable[..., Sequence[Any] | None] | None) -> Callable[..., Any]:
    """The op itself on the whole batch where ``lift`` can say how, else once for each sample.

    Either way autograd, tracing and further levels of vmap meet ordinary calls of the op.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        mapped = [(i, dim) for i, dim in enumerate(in_dims) if isinstance(dim, int)]  # a list argument has a list
        front = list(args)
        for i, dim in mapped:
            front[i] = args[i].movedim(dim, 0)
        lifted = lift(*front) if lift is not None and [i for i, _ in mapped] == [0] else None
        if lifted is not None:
            out = op(*lifted, **kwargs)
            return out, (0,) * len(out) if isinstance(out, tuple) else 0
        samples = []
        for k in range(info.batch_size):
            sample = list(front)
            for i, _ in mapped:
                sample[i] = front[i][k]
            samples.append(op(*sample, **kwargs))
        if isinstance(samples[0], tuple):
            return tuple(torch.stack(each) for each in zip(*samples, strict=True)), (0,) * len(samples[0])
        return torch.stack(samples), 0

    return rule


def same_arguments(*args: Any) -> Sequence[Any]:
    """``lift`` of an elementwise op: a batch in front of the input changes nothing."""
    return args


class _Gradient:
    """A backward function in the form that torch.library takes."""

    def __init__(self, op: OpOverload, function: Backward, saves: Sequence[str] | None) -> None:
        self.op = op
        self.function = function
        self.saves = saves
        self.positional = [a.name for a in op._schema.arguments if not a.kwarg_only]

    def register(self, name: str) -> None:
        torch.library.register_autograd(
            f"fxquant::{name}", self.backward, setup_context=self.setup_context, lib=LIBRARY
        )

    def setup_context(
        self, ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Mapping[str, Any] | None = None
    ) -> None:
        arguments = _by_name(self.op, inputs, keyword_only_inputs or {})
        tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        ctx.saved_names = [name for name in tensors if self.saves is None or name in self.saves]
        ctx.static = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        ctx.save_for_backward(*(arguments[name] for name in ctx.saved_names))

    def backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = types.SimpleNamespace(**ctx.static, **dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True)))
        found = self.function(arguments, *grads)
        return tuple(found.get(name) for name in self.positional)
