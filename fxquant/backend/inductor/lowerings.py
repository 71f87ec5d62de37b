"""How Inductor lowers the operators of ours that reach it whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.inline import of_operands, traced
from fxquant.graph.views import AverageMinMax, Item
from fxquant.numerics import planes
from fxquant.numerics.floating import copysign_by_bits
from fxquant.ops import saved
from fxquant.ops.library import ARITHMETIC, Arithmetic
from fxquant.ops.lowering_table import becomes
from fxquant.ops.marks import MATERIALIZE
from fxquant.ops.qparams import AFFINE_QPARAMS, AVERAGE_MIN_MAX

aten = torch.ops.aten


def register_lowerings() -> None:
    """Tells Inductor, once a process, of those that `fxquant.ops.lowering_table` has for "whole".

    What `MATERIALIZE` gives is a buffer of its own. An update of ranges is stored, without what it is computed from.
    Fake-quants are expressions that fuse with their neighbours.
    """
    from torch._inductor.lowering import lowerings, register_lowering  # private; tried on 2.11, 2.13 and 2.15

    if MATERIALIZE in lowerings:
        return
    of_its_own: dict[Any, Callable[..., Any]] = {
        MATERIALIZE: _materialized,
        AVERAGE_MIN_MAX: _averaged,
        AFFINE_QPARAMS: functools.partial(_lowered, ARITHMETIC[AFFINE_QPARAMS], store=True),
        saved.PACK_PLANES: _packed,
    }
    for op in ARITHMETIC:
        if becomes(op, "inductor") == "whole":
            lowering = of_its_own.get(op) or functools.partial(_lowered, ARITHMETIC[op])
            register_lowering(op, type_promotion_kind=None)(lowering)


def _materialized(x: Any, rows: int = 0) -> Any:
    """A buffer of its own, for those that read the result; others may read the expression that fills it."""
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15

    if isinstance(x.data, ir.StorageBox) and isinstance(x.data.data, ir.Pointwise):
        load, sizes = x.make_loader(), list(x.get_size())
        x = ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=load, ranges=sizes)
    x.realize()
    if rows:
        _loop_apart(x.data.data, lambda: [list(range(rows))])
    return x


def _merged(buffer: Any) -> list[list[int]]:
    """The dimensions of a buffer that share a loop; none where its loops are in another order."""
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15

    if not isinstance(buffer, ir.ComputedBuffer):  # an expression, if Inductor was told to unroll such sums
        return []
    (loops, _), _ = buffer.simplify_and_reorder()
    groups: list[list[int]] = [[] for _ in loops]
    dims = [d for d, size in enumerate(buffer.get_size()) if size != 1]
    for size, group in zip(loops, groups, strict=True):
        while dims and math.prod(buffer.get_size()[d] for d in group) != size:
            group.append(dims.pop(0))
    found = [math.prod(buffer.get_size()[d] for d in group) for group in groups]
    return groups if found == list(loops) and not dims else []


def _loop_apart(buffer: Any, groups: Callable[[], list[list[int]]]) -> None:
    """Keeps each of these groups of neighbouring dimensions of a computed buffer in a loop apart from other dimensions.

    They are asked for once layouts are final.

    Inductor makes one loop of all dimensions that no index tells apart, and its C++ fuses loops of equal ranges only:
    with a reduction over the others it would not.
    """
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15

    if not isinstance(buffer, ir.ComputedBuffer):
        return
    simplify = buffer.simplify_and_reorder

    def apart(extra_indexing_constraints: Any = None, recompute_sizes_body_func: Any = None) -> Any:
        if extra_indexing_constraints is None and recompute_sizes_body_func is None:
            (sizes, _), body, (index, _) = buffer.get_default_sizes_body()  # without dimensions of size 1
            there = {d: number for number, d in enumerate(d for d, size in enumerate(buffer.get_size()) if size != 1)}
            kept = [[there[d] for d in group if d in there] for group in groups()]
            linear = [functools.reduce(lambda i, d: i * sizes[d] + index[d], group, sympy.S.Zero) for group in kept]
            constraints = getattr(ir, "ExtraIndexingConstraints", lambda *pair: pair)  # a tuple before torch 2.15
            extra_indexing_constraints = constraints(body.var_ranges, linear)
        return simplify(extra_indexing_constraints, recompute_sizes_body_func)

    own: Any = buffer  # this buffer alone, whatever its class does
    own.simplify_and_reorder = apart


def _averaged(low: Any, high: Any, minimum: Any, maximum: Any, constant: float) -> tuple[Any, ...]:
    """The new range, written into the state at once where the graph would copy it there anyway, and reads it no more.

    Else two buffers more a site, and two copies.
    """
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15

    new_low, new_high = _lowered(ARITHMETIC[AVERAGE_MIN_MAX], low, high, minimum, maximum, constant)
    alike = all(
        (new.get_dtype(), list(new.get_size())) == (old.get_dtype(), list(old.get_size()))
        for new, old in ((new_low, minimum), (new_high, maximum))
    )
    if not alike or maximum.get_name() in new_low.get_read_names() or not _is_only_updated():
        new_low.realize()
        new_high.realize()
        return new_low, new_high
    for new, old in ((new_high, maximum), (new_low, minimum)):  # in this order: the new maximum reads the old minimum
        ir.MutationLayoutSHOULDREMOVE.realize_into(new.data, old.data, unsafe_alias=True)
    return minimum, maximum


def _is_only_updated() -> bool:
    """Whether the state is an input that the graph reads for this update alone, and then overwrites with it.

    Nor may the new range leave the graph, which would hand out the state itself: but for the state, only scale and zero
    point are computed from it.
    """
    from torch._inductor.virtualized import V  # private; tried on 2.11, 2.13 and 2.15

    current: Any = V.graph.current_node
    new = {part.index: part.node for user in current.users if (part := Item.of(user)) is not None}
    states = AverageMinMax(current).state
    return all(_replaces(new.get(index), state, current) for index, state in enumerate(states))


def _replaces(new: fx.Node | None, state: fx.Node, current: fx.Node) -> bool:
    """Whether ``new`` is copied into an input that is read for it alone, and else makes scale and zero point only."""
    others = [user for user in state.users if user is not current]
    if new is None or state.op != "placeholder" or len(others) != 1 or others[0].target is not aten.copy_.default:
        return False
    (copy,) = others
    if argument(copy, "self") is not state or argument(copy, "src") is not new:
        return False
    return all(user is copy or user.target is AFFINE_QPARAMS for user in new.users)


def _lowered(arithmetic: Arithmetic, *args: Any, store: bool = False, **kwargs: Any) -> Any:
    """What a function of tensors and numbers lowers to, operation by operation, of which Inductor sees no nodes.

    ``store``: each result is a buffer, which later results read.
    """
    from torch._inductor.lowering import lowerings  # private; tried on 2.11, 2.13 and 2.15

    body = _traced(arithmetic, tuple(_described(a) for a in args), tuple(kwargs.items()))
    tensors = iter([_read_once(a) for a in args if _is_tensor(a)])
    values: dict[fx.Node, Any] = {}
    stored = body.output_node().all_input_nodes if store else ()
    for node in body.nodes:
        if node.op == "placeholder":
            values[node] = next(tensors)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        elif isinstance(node.meta.get("val"), torch.SymInt):
            values[node] = node.meta["val"].node.expr
        else:
            given, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = fx.node.map_aggregate(lowerings[node.target](*given, **named), _read_once)
            if node in stored:
                values[node].realize()
    raise AssertionError("a traced graph ends in its output")


def _read_once(value: Any) -> Any:
    """The same value; where one loop reads it several times, at one index, the expression is evaluated once.

    Inductor evaluates an expression anew for each reader, and what it reads for each of those: the code that it
    generates has each operation once, but takes as long to generate as there are paths.
    """
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15

    if not isinstance(value, ir.TensorBox) or not isinstance(value.data, ir.StorageBox):
        return value
    loop = value.data.data
    if type(loop) is not ir.Pointwise or isinstance(loop.inner_fn, _Once):
        return value
    once = _Once(loop.inner_fn)
    return ir.Pointwise.create(device=loop.device, dtype=loop.dtype, inner_fn=once, ranges=loop.ranges)


class _Once:
    """An expression by its index, remembered while the same handler of operations is in charge."""

    def __init__(self, evaluate: Callable[[Any], Any]) -> None:
        self.evaluate = evaluate
        self.handler: Any = None
        self.known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, index: Any) -> Any:
        from torch._inductor.virtualized import V  # private; tried on 2.11, 2.13 and 2.15

        handler, key = V.get_ops_handler(), tuple(index)
        if handler is not self.handler:
            self.handler, self.known = handler, {}
        if key not in self.known:
            self.known[key] = self.evaluate(index)
        return self.known[key]


def _packed(values: Any, bits: int, dim: int) -> Any:
    """Masks as a loop over the planes; unrolled, the compiler would meet their dozen operations eight times."""
    from torch._inductor import ir  # private; tried on 2.11, 2.13 and 2.15
    from torch._inductor.lowering import lowerings  # private; tried on 2.11, 2.13 and 2.15
    from torch._inductor.virtualized import V  # private; tried on 2.11, 2.13 and 2.15

    if values.get_dtype() != torch.bool:
        return _lowered(ARITHMETIC[saved.PACK_PLANES], values, bits, dim)
    # In the order of memory, so that the loops of the sum, which follow what they read, are those of the bytes.
    current: Any = V.graph.current_node
    strides = argument(current, "values").meta["val"].stride()
    order = list(reversed(ir.get_fill_order(strides, V.graph.sizevars.shape_env)))
    dim = order.index(dim)
    total = _lowered(planes.sum_masks, lowerings[aten.permute.default](values, order), dim)
    packed = _lowered(planes.as_bytes, total)
    packed.realize()
    _loop_apart(packed.data.data, lambda: _merged(total.data.data))
    back = lowerings[aten.permute.default](packed, [order.index(d) for d in range(len(order))])
    if all(sympy.sympify(stride).is_number for stride in back.get_stride()):
        return back
    # What is kept for backward leaves the graph, and Inductor (2.13) cannot order the open strides of a view.
    return packed if order == sorted(order) else lowerings[aten.clone.default](back)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "get_size")


def _described(value: Any) -> Any:
    """A tensor by what its arithmetic can depend on, numbers as they are."""
    if not _is_tensor(value):
        return value
    sizes = tuple(int(size) if size.is_number else size for size in map(sympy.sympify, value.get_size()))
    return sizes, value.get_dtype(), value.get_device()


def _traced(arithmetic: Arithmetic, described: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> fx.Graph:
    from torch._inductor.virtualized import V  # private; tried on 2.11, 2.13 and 2.15
    from torch._subclasses.fake_tensor import FakeTensorMode  # private; tried on 2.11, 2.13 and 2.15

    of_any_size = _traced_for_all(arithmetic, tuple(map(_of_any_size, described)), named)
    if of_any_size is not None:
        return of_any_size
    shapes = [d[0] for d in described if isinstance(d, tuple)]
    if all(isinstance(size, int) for shape in shapes for size in shape):
        return _traced_once(arithmetic, described, named)
    # A symbol means what its graph says: bodies of open sizes are shared within a graph, and go with it.
    bodies = _OPEN.setdefault(V.graph, {})
    key = arithmetic, described, named
    if key not in bodies:
        environment = V.graph.sizevars.shape_env
        bodies[key] = _trace(*key, FakeTensorMode(shape_env=environment), environment)
    return bodies[key]


_OPEN: WeakKeyDictionary[Any, dict[tuple[Any, ...], fx.Graph]] = WeakKeyDictionary()
_CUT = (planes.sum_masks, ARITHMETIC[saved.PACK_PLANES], ARITHMETIC[saved.UNPACK_PLANES])  # into planes of a known size


def _of_any_size(value: Any) -> Any:
    """A tensor with 2 in the place of every size that is not 0 or 1, which broadcast."""
    if not isinstance(value, tuple):
        return value
    return tuple(size if isinstance(size, int) and size < 2 else 2 for size in value[0]), *value[1:]


@functools.cache
def _traced_for_all(
    arithmetic: Arithmetic, described: tuple[Any, ...], named: tuple[tuple[str, Any], ...]
) -> fx.Graph | None:
    """The graph that serves tensors of all sizes, as most do; None where it holds one."""
    if arithmetic in _CUT:
        return None
    body = _traced_once(arithmetic, described, named)
    lists = [a for node in body.nodes if node.op != "output" for a in node.args if isinstance(a, list)]
    return body if {size for sizes in lists for size in sizes} <= {1, -1} else None


@functools.cache
def _traced_once(arithmetic: Arithmetic, described: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> fx.Graph:
    from torch._subclasses.fake_tensor import FakeTensorMode  # private; tried on 2.11, 2.13 and 2.15

    return _trace(arithmetic, described, named, FakeTensorMode())


def _trace(
    arithmetic: Arithmetic,
    described: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    mode: Any,
    symbols: Any = None,
) -> fx.Graph:
    from torch._inductor.decomposition import select_decomp_table  # private; tried on 2.11, 2.13 and 2.15

    def size_of(size: Any) -> Any:
        return size if isinstance(size, int) else symbols.create_symintnode(size, hint=None)

    with mode:
        shown = [d for d in described if isinstance(d, tuple)]
        fakes = [torch.empty([size_of(s) for s in shape], dtype=dtype, device=on) for shape, dtype, on in shown]
    on_tensors = of_operands(arithmetic, described, dict(named), lambda each: isinstance(each, tuple))
    on_cpu = all(fake.device.type == "cpu" for fake in fakes)
    return traced(on_tensors, fakes, {**select_decomp_table(), **(_IN_VECTORS if on_cpu else {})})


def _copysign(magnitude: Any, x: Any) -> Any:
    single = magnitude.dtype == x.dtype == torch.float32
    return copysign_by_bits(magnitude, x) if single else NotImplemented


_IN_VECTORS: dict[Any, Callable[..., Any]] = {aten.isnan.default: lambda x: x != x, aten.copysign.Tensor: _copysign}
"""What Inductor's C++ computes one by one, or by a call → the same bits in operations that it has vectors for."""
