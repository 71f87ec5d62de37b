"""How Inductor lowers the operators of ours that reach it whole."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops.library import ARITHMETIC
from fxquant.ops.materialize import MATERIALIZE
from fxquant.ops.qparams import AFFINE_QPARAMS, AVERAGE_MIN_MAX


def register_lowerings() -> None:
    """Tells Inductor, once a process.

    What `MATERIALIZE` reads is a buffer of its own; the op itself is nothing. An update of ranges is computed in one
    go: `_in_one_go`.
    """
    from torch._inductor.lowering import lowerings, register_lowering  # private; tried on 2.13

    def stored(x: Any) -> Any:
        x.realize()
        return x

    if MATERIALIZE in lowerings:
        return
    register_lowering(MATERIALIZE, type_promotion_kind=None)(stored)
    for op in (AVERAGE_MIN_MAX, AFFINE_QPARAMS):
        register_lowering(op, type_promotion_kind=None)(functools.partial(_in_one_go, op))


def _in_one_go(op: Any, *args: Any) -> tuple[Any, ...]:
    """The op's arithmetic, of which nothing is stored but the results.

    As a node for each operation, Inductor stores every value that is a function of a range, once the range is updated
    in place: 26 buffers a site, each of which it schedules and generates code for.
    """
    from torch._inductor.lowering import lowerings  # private; tried on 2.13

    body = _traced(op, tuple(_described(a) for a in args))
    tensors = iter([a for a in args if _is_tensor(a)])
    values: dict[fx.Node, Any] = {}
    results: tuple[Any, ...] = ()
    for node in body.nodes:
        if node.op == "placeholder":
            values[node] = next(tensors)
        elif node.op == "output":
            results = fx.map_arg(node.args[0], values.__getitem__)
        else:
            given, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = lowerings[node.target](*given, **named)
    for result in results:
        result.realize()
    return results


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "get_size")


def _described(value: Any) -> Any:
    """A tensor by what its arithmetic can depend on, numbers as they are."""
    if not _is_tensor(value):
        return value
    return tuple(int(size) for size in value.get_size()), value.get_dtype(), value.get_device()


@functools.cache
def _traced(op: Any, described: tuple[Any, ...]) -> fx.Graph:
    from torch._inductor.decomposition import select_decomp_table  # private; tried on 2.13
    from torch._subclasses.fake_tensor import FakeTensorMode  # private; tried on 2.13

    shown = [d for d in described if isinstance(d, tuple)]

    def arithmetic(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return ARITHMETIC[op](*(next(given) if isinstance(d, tuple) else d for d in described))

    with FakeTensorMode():
        fakes = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shown]
        return make_fx(arithmetic, decomposition_table=select_decomp_table())(*fakes).graph
