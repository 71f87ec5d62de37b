"""What Inductor schedules for one graph: kernels, what they read and write, allocations. Compiles nothing.

Touches private torch API; tried on 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fxquant.graph.edit import copied
from fxquant.graph.nodes import results
from fxquant.support.patches import SCHEDULE


@dataclass(frozen=True, kw_only=True)
class Access:
    """One tensor that a kernel reads or writes, in bytes, and the nodes that do so within it."""

    size: sympy.Expr
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, kw_only=True)
class ScheduledKernel:
    """One generated kernel or library call, each of its tensors once."""

    reads: tuple[Access, ...]
    writes: tuple[Access, ...]


class Stopped(Exception):
    """Raised where the compiled step would begin to run."""


class _Scheduled(BaseException):
    """Raised where Inductor would write kernels; no Exception, which Inductor wraps in its own."""


class _Stop:
    """A compiled graph that never runs."""

    _boxed_call = True  # it takes one list of inputs, as AOTAutograd may ask for

    def __call__(self, *_: Any) -> Any:
        raise Stopped


stop = _Stop()


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """One graph as Inductor schedules it. ``outputs``: node → its allocation and that one's bytes."""

    gm: fx.GraphModule
    backward: bool
    kernels: tuple[ScheduledKernel, ...] = ()
    outputs: Mapping[fx.Node, tuple[str, sympy.Expr]]
    inputs: frozenset[str] = frozenset()
    open: frozenset[sympy.Symbol] = frozenset()


def recorder(found: list[Lowered]) -> Callable[..., Any]:
    """An ``inner_compile`` that appends what it is given, scheduled, and compiles nothing."""
    from torch._inductor.compile_fx import compile_fx_inner

    def schedule(_: Callable[..., Any], graph: Any) -> Any:
        _report_strides(graph)
        graph.init_wrapper_code()
        graph._update_scheduler()
        raise _Scheduled(_reading(graph))

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        partitioned = copied(gm)  # Inductor's post-grad passes rewrite the graph, and rename nodes
        backward = bool(settings.get("is_backward"))
        outputs = results(partitioned.graph)
        read: dict[str, Any] = {"storages": [None] * len(outputs)}
        try:
            with SCHEDULE.acting(schedule):
                compile_fx_inner(gm, example_inputs, **settings)  # returns where there is nothing to compile
        except _Scheduled as scheduled:
            (read,) = scheduled.args
        known = zip(outputs, read.pop("storages"), strict=True)
        named = {node: where for node, where in known if isinstance(node, fx.Node) and where is not None}
        found.append(Lowered(gm=partitioned, backward=backward, outputs=named, **read))
        return stop

    return record


def _report_strides(graph: Any) -> None:
    """Tells AOTAutograd how the forward graph's results lie in memory: so the backward graph gets them."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    for output in graph.graph_outputs:
        shown = hasattr(output, "get_stride") and output.has_tensor_output()
        env = graph.sizevars.shape_env
        read = getattr(env, "evaluate_symexpr", env.deserialize_symexpr)  # torch 2.15 keeps symbols
        strides = tuple(map(read, map(str, output.get_stride()))) if shown else None
        context.output_strides.append(strides)


def _reading(graph: Any) -> dict[str, Any]:
    """The fields of `Lowered` that Inductor knows; inside its graph handler."""
    kernels = tuple(_kernel(graph, node) for node in graph.scheduler.nodes)
    env = graph.sizevars.shape_env
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # before torch 2.13
    return {
        "kernels": kernels,
        "storages": [_storage(graph, out) for out in graph.graph_outputs],
        "inputs": frozenset(graph.graph_inputs),
        "open": frozenset(values),
    }


def _storage(graph: Any, output: Any) -> tuple[str, sympy.Expr] | None:
    """Name and bytes of the allocation that an output lies in; None for what is no tensor."""
    if not hasattr(output, "get_name") or not output.has_tensor_output():
        return None
    name = output.get_name()
    while name in graph.name_to_buffer:
        buffer = graph.name_to_buffer[name]
        base = _aliased(buffer)
        if base is None:
            return name, buffer.get_layout().storage_size() * buffer.get_dtype().itemsize
        name = base
    return name, sympy.Integer(0)  # an input or a constant


def _aliased(buffer: Any) -> str | None:
    """The buffer whose memory this one is a view of, or is written into."""
    from torch._inductor import ir

    layout = buffer.layout
    if isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
        return str(layout.get_buffer().get_name())
    if isinstance(layout, ir.NonOwningLayout):
        return str(layout.view.get_name())
    names = buffer.get_inputs_that_alias_output()
    return str(names[0]) if names else None


def _kernel(graph: Any, node: Any) -> ScheduledKernel:
    """The rule of Inductor's ``get_read_write_buffer_accesses``, with sizes as expressions.

    What only the kernel itself uses is in registers. A buffer that is written and read counts as written. A kernel of
    one loop reads no more of a buffer than it has iterations.
    """
    from torch._inductor import ir
    from torch._inductor.scheduler import (
        ExternKernelSchedulerNode,
        FusedSchedulerNode,
        NopKernelSchedulerNode,
        SchedulerNode,
    )

    multiple = isinstance(node, ExternKernelSchedulerNode) and isinstance(node.node, ir.MultiOutput)
    if isinstance(node, NopKernelSchedulerNode) or multiple:
        return ScheduledKernel(reads=(), writes=())
    reads, writes = ({dep.name for dep in deps} for deps in (node.read_writes.reads, node.read_writes.writes))
    if isinstance(node, FusedSchedulerNode):
        own = set(node.snodes)
        inner = {name for name in writes if all(u.node in own for u in graph.scheduler.name_to_buf[name].users)}
        reads, writes = reads - inner, writes - inner
    iterations = None
    if isinstance(node, SchedulerNode):
        iterations = sympy.prod(sum(map(tuple, node.get_ranges()), ()))

    def accesses(names: Iterable[str], kind: str) -> tuple[Access, ...]:
        found = []
        for name in sorted(names):
            uses = sum(dep.name == name for dep in (*node.read_writes.reads, *node.read_writes.writes))
            size = _bytes(graph, name, None if iterations is None else iterations * uses)
            if size is not None:
                found.append(Access(size=size, nodes=_touching(node, name, kind)))
        return tuple(found)

    return ScheduledKernel(reads=accesses(reads - writes, "reads"), writes=accesses(writes, "writes"))


def _touching(kernel: Any, name: str, kind: str) -> tuple[fx.Node, ...]:
    """For each loop of the kernel that reads or writes a buffer, the graph node whose value it computes."""
    found: dict[fx.Node, None] = {}
    for loop in kernel.get_nodes():
        if loop.node is not None and any(dep.name == name for dep in getattr(loop.read_writes, kind)):
            origin = loop.node.get_origin_node() or max(loop.node.get_origins(), default=None)
            if origin is not None:
                found[origin] = None
    return tuple(found)


def _bytes(graph: Any, name: str, limit: sympy.Expr | None) -> sympy.Expr | None:
    """Bytes of a buffer, of ``limit`` elements at most; None for what is no tensor of the graph."""
    from torch._inductor import ir

    buffer = graph.name_to_buffer.get(name) or graph.graph_inputs.get(name)
    if buffer is None:
        return None
    if isinstance(buffer, ir.TorchBindObject):
        return sympy.Integer(buffer.get_buf_bytes())
    layout = buffer.get_layout() if isinstance(buffer, ir.TensorBox) else buffer.layout
    parts: list[Any] = []
    if isinstance(layout, ir.MultiOutputLayout):
        users = (user.node for user in graph.scheduler.name_to_buf[name].users)
        inner = [user for user in users if isinstance(getattr(user, "node", None), ir.MultiOutput)]
        parts = [_bytes(graph, out.node.get_name(), limit) for user in inner for out in user.get_outputs()]
    elif isinstance(layout, ir.NoneLayout):
        parts = [_bytes(graph, changed, limit) for changed in buffer.get_mutation_names()]
    else:
        elements = sympy.prod(buffer.get_size())
        sizes = graph.sizevars
        hint = getattr(sizes, "optimization_hint", None) or sizes.size_hint  # size_hint before torch 2.13
        if limit is not None and hint(limit, fallback=0) < hint(elements, fallback=0):
            elements = limit
        parts = [elements * buffer.get_dtype().itemsize]
    return sum((part for part in parts if part is not None), sympy.Integer(0))
