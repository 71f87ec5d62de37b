"""How Inductor lowers the operators of ours that reach it whole."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops import fake_quantize, quantize, saved
from fxquant.ops.library import ARITHMETIC
from fxquant.ops.materialize import MATERIALIZE
from fxquant.ops.qparams import AFFINE_QPARAMS, AVERAGE_MIN_MAX

_FUSED = (
    *fake_quantize.FAKE_QUANTIZE,
    *fake_quantize.BACKWARD,
    *quantize.QUANTIZE,
    *quantize.DEQUANTIZE,
    *saved.FORWARD,
    *saved.BACKWARD,
)


def register_lowerings() -> None:
    """Tells Inductor, once a process.

    What `MATERIALIZE` gives is a buffer of its own. An update of ranges is stored, without what it is computed from:
    as a node for each operation, Inductor stores every value that is a function of a range, once the range is updated
    in place: 26 buffers a site, each of which it schedules and generates code for. Fake-quants are expressions that
    fuse with their neighbours.
    """
    from torch._inductor.lowering import lowerings, register_lowering  # private; tried on 2.13

    if MATERIALIZE in lowerings:
        return
    register_lowering(MATERIALIZE, type_promotion_kind=None)(_materialized)
    for op in (AVERAGE_MIN_MAX, AFFINE_QPARAMS):
        register_lowering(op, type_promotion_kind=None)(functools.partial(_stored, op))
    for op in _FUSED:
        register_lowering(op, type_promotion_kind=None)(functools.partial(_arithmetic, op))


def _materialized(x: Any, rows: int = 0) -> Any:
    """A buffer of its own, for those that read the result; others may read the expression that fills it."""
    from torch._inductor import ir  # private; tried on 2.13

    if isinstance(x.data, ir.StorageBox) and isinstance(x.data.data, ir.Pointwise):
        load, sizes = x.make_loader(), list(x.get_size())
        x = ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=load, ranges=sizes)
    x.realize()
    if rows:
        _loop_over_rows(x.data.data, rows)
    return x


def _loop_over_rows(buffer: Any, rows: int) -> None:
    """Keeps the first ``rows`` dimensions of a computed buffer in a loop around the others.

    Inductor makes one loop of all dimensions that no index tells apart, and its C++ fuses loops of equal ranges only:
    with a reduction over the others it would not.
    """
    from torch._inductor import ir  # private; tried on 2.13

    if not isinstance(buffer, ir.ComputedBuffer):
        return
    simplify = buffer.simplify_and_reorder

    def apart(extra_indexing_constraints: Any = None, recompute_sizes_body_func: Any = None) -> Any:
        (sizes, _), body, (index, _) = buffer.get_default_sizes_body()  # without dimensions of size 1
        outer = sum(1 for size in buffer.get_size()[:rows] if size != 1)
        if outer and extra_indexing_constraints is None and recompute_sizes_body_func is None:
            row = functools.reduce(lambda row, d: row * sizes[d] + index[d], range(1, outer), index[0])
            extra_indexing_constraints = (body.var_ranges, [row])
        return simplify(extra_indexing_constraints, recompute_sizes_body_func)

    buffer.simplify_and_reorder = apart  # type: ignore[method-assign]


def _stored(op: Any, *args: Any) -> tuple[Any, ...]:
    results: tuple[Any, ...] = _arithmetic(op, *args)
    for result in results:
        result.realize()
    return results


def _arithmetic(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What the op's arithmetic lowers to, operation by operation, of which Inductor sees no nodes."""
    from torch._inductor.lowering import lowerings  # private; tried on 2.13

    body = _traced(op, tuple(_described(a) for a in args), tuple(kwargs.items()))
    tensors = iter([a for a in args if _is_tensor(a)])
    values: dict[fx.Node, Any] = {}
    for node in body.nodes:
        if node.op == "placeholder":
            values[node] = next(tensors)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        else:
            given, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = lowerings[node.target](*given, **named)
    raise AssertionError("a traced graph ends in its output")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "get_size")


def _described(value: Any) -> Any:
    """A tensor by what its arithmetic can depend on, numbers as they are."""
    if not _is_tensor(value):
        return value
    return tuple(int(size) for size in value.get_size()), value.get_dtype(), value.get_device()


@functools.cache
def _traced(op: Any, described: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> fx.Graph:
    from torch._inductor.decomposition import select_decomp_table  # private; tried on 2.13
    from torch._subclasses.fake_tensor import FakeTensorMode  # private; tried on 2.13

    shown = [d for d in described if isinstance(d, tuple)]

    def arithmetic(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return ARITHMETIC[op](*(next(given) if isinstance(d, tuple) else d for d in described), **dict(named))

    with FakeTensorMode():
        fakes = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shown]
        return make_fx(arithmetic, decomposition_table=select_decomp_table())(*fakes).graph
