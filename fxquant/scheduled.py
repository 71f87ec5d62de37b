"""What Inductor makes of one training step, up to the kernels that it would write and compile.

Touches private torch API; tried on 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx, nn

from fxquant.backend import compile_quantized, quantize_graph, unreported
from fxquant.capture import compiled_aside, copied, untouched
from fxquant.errors import InvalidArgument, UnsupportedModel
from fxquant.graph import is_bind
from fxquant.ops import fake_quantize
from fxquant.resolve import execution_order, nested_graphs
from fxquant.state import quantizers
from fxquant.table import short

_SITE = "fxquant.site"  # a frame in nn_module_stack: passes and AOTAutograd hand it on to what they make of a node


@dataclass(frozen=True, kw_only=True)
class Access:
    """One tensor that a kernel reads or writes, in bytes, and the nodes that do so within it."""

    size: sympy.Expr
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One generated kernel or library call, each of its tensors once."""

    reads: tuple[Access, ...]
    writes: tuple[Access, ...]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One allocation that the forward graph hands to the backward graph.

    Attributes:
        size: bytes, the whole allocation even where only a part of it is looked at.
        dtype, shape: of the first tensor in it.
        node: what made it in the forward graph.
        readers: what reads it in the backward graph.
    """

    size: sympy.Expr
    dtype: torch.dtype
    shape: tuple[Any, ...]
    node: fx.Node
    readers: tuple[fx.Node, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step: the partitioned graphs, their kernels, and what lies between them.

    ``open`` holds the symbols that stand for the batch.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    kernels: tuple[Kernel, ...]
    kept: tuple[Kept, ...]
    open: frozenset[sympy.Symbol]


def site_of(node: fx.Node) -> str | None:
    """The quantizer that a node of either graph computes for, or computes the gradient of."""
    for stack in (node.meta.get("nn_module_stack"), node.meta.get("fwd_nn_module_stack")):
        if stack and _SITE in stack:
            return str(stack[_SITE][0])
    return None


def trace_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, quantized: bool, batch: int | None
) -> Step:
    """Compiles one training step of a prepared model, forward and backward, and stops before kernels are written.

    The pipeline is the one that training runs, on fake tensors: nothing is computed and the model stays as it was.
    ``quantized=False`` gives plain Inductor on the same model. With ``batch``, dimension 0 of every input of that size
    is left open.

    Raises UnsupportedModel for a graph break and for a size that cannot stay open, InvalidArgument for inputs that do
    not run and for a model with nothing to train.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise _cannot_run(error) from error
    if batch is not None:
        args, kwargs = _opened((args, dict(kwargs)), batch)
    found = _lowered(model, args, kwargs, quantized)
    if not any(one.backward for one in found):
        raise InvalidArgument(
            f"model must have something to train: got {type(model).__name__} without a gradient to any parameter. "
            "Set requires_grad on what is to be trained."
        )
    step = _step(*sorted(found, key=lambda one: one.backward))
    sizes = [access.size for kernel in step.kernels for access in (*kernel.reads, *kernel.writes)]
    if batch is not None and not any(size.free_symbols & step.open for size in sizes):
        raise UnsupportedModel(
            f"the model must leave the batch open: got a graph for a batch of {batch} only. "
            "Look for sizes that forward writes as numbers, or leave dynamic_batch out."
        )
    return step


def _lowered(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], quantized: bool) -> list[_Lowered]:
    """The forward graph, and the backward graph if there is one."""
    found: list[_Lowered] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if quantized:
            captured = quantize_graph(gm, example_inputs)
            _mark_sites(captured)
            compile_quantized(captured, example_inputs, inner_compile=_recorder(found))
        else:
            from torch._inductor.compile_fx import compile_fx

            compile_fx(_without_binds(gm), example_inputs, inner_compile=_recorder(found))
        return _stop

    with untouched(model), torch.enable_grad(), unreported(), _uncached():
        for module in model.modules():
            module.__dict__.pop("_compiled_call_impl", None)  # what `Module.compile` left would run instead
        for _, quantizer in quantizers(model):
            quantizer.resolved = True  # the steps after the first, which may have to set the ranges
        with compiled_aside(model, backend, fullgraph=True, dynamic=False) as compiled:
            _until_stopped(compiled, args, kwargs)
    return found


def _step(forward: _Lowered, backward: _Lowered) -> Step:
    kept: dict[str, Kept] = {}
    readers = {n.name: tuple(n.users) for n in backward.gm.graph.nodes if n.op == "placeholder"}
    for node, (storage, size) in forward.outputs.items():
        if node.name not in readers or storage in forward.inputs:
            continue
        value, known = node.meta["val"], kept.get(storage)
        kept[storage] = Kept(
            size=size,
            dtype=known.dtype if known else value.dtype,
            shape=known.shape if known else tuple(value.shape),
            node=known.node if known else node,
            readers=(*(known.readers if known else ()), *readers[node.name]),
        )
    kernels = (*forward.kernels, *backward.kernels)
    return Step(
        forward=forward.gm,
        backward=backward.gm,
        kernels=kernels,
        kept=tuple(kept.values()),
        open=forward.open | backward.open,
    )


# ---------------------------------------------------------------- driving torch.compile


class _Stopped(Exception):
    """Raised where the compiled step would begin to run."""


class _Scheduled(BaseException):
    """Raised where Inductor would write kernels; no Exception, which Inductor wraps in its own."""


def _stop(*_: Any) -> Any:
    raise _Stopped


_stop._boxed_call = True  # type: ignore[attr-defined]  # it takes one list of inputs, as AOTAutograd may ask for


def _until_stopped(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    try:
        compiled(*args, **kwargs)
    except _Stopped:
        return
    except BackendCompilerFailed:
        raise  # ours or torch's to answer for: not the inputs
    except Unsupported as error:
        if _FAKE_CALL in str(error):
            raise _cannot_run(error) from error
        frame = error.real_stack[-1] if error.real_stack else None
        where = f" at {short(frame.filename)}:{frame.lineno}" if frame else ""
        raise UnsupportedModel(
            f"the model must be one graph for its cost to be counted: got a graph break{where}: {_first_line(error)}. "
            "Remove the break, or prepare and count the parts."
        ) from error
    except Exception as error:
        raise _cannot_run(error) from error
    raise UnsupportedModel(
        "the model must reach the compiler for its cost to be counted: got a forward that Dynamo ran in Python. "
        "TORCH_LOGS=graph_breaks says why."
    )


_FAKE_CALL = "when making fake tensor call"  # how Dynamo says that an operator refuses its operands


def _cannot_run(error: Exception) -> InvalidArgument:
    told = re.search(r"got (\w+)\(['\"](.*)['\"]\)", str(error))  # where Dynamo quotes an operator's complaint
    what = f"{told[1]}: {told[2].rstrip('.')}" if told else f"{type(error).__name__}: {_first_line(error)}"
    return InvalidArgument(
        f"args and kwargs must run through the model: got {what}. Give cost what was given to fxquant.prepare."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _opened(inputs: Any, batch: int) -> Any:
    """The inputs as other tensors on the same data, whose batch Dynamo is told to leave open."""

    def opened(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != batch:
            return value
        other = value.detach().requires_grad_(value.requires_grad)
        torch._dynamo.maybe_mark_dynamic(other, 0)
        return other

    return torch.utils._pytree.tree_map(opened, inputs)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """No cache is read, nothing is remembered, and the backward graph is compiled with the forward."""
    from torch._dynamo import pgo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    off = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    ours = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    known = pgo.get_code_state()  # sizes seen before, from which Dynamo guesses what varies; not to learn from this
    before = copy.deepcopy(known)
    try:
        with inductor.patch(off), functorch.patch(ours):
            yield
    finally:
        known.clear()
        known.update(before)


def _without_binds(gm: fx.GraphModule) -> fx.GraphModule:
    """What Dynamo would have seen of the model before it was prepared."""
    for node in [node for node in gm.graph.nodes if node.op == "call_function"]:
        for body in nested_graphs(gm, node):
            _without_binds(body)
        if is_bind(node):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _mark_sites(gm: fx.GraphModule) -> None:
    """Writes the site into what a quantizer consists of: the fake-quant node, and what computes and keeps its range."""
    nodes = [n for n in execution_order(gm) if n.target in fake_quantize.FAKE_QUANTIZE and "site" in n.meta]
    sources = {node.args[0] for node in nodes}
    for node in nodes:
        site = node.meta["site"]
        kept = [user for state in site.state for user in state.users if user.target is torch.ops.aten.copy_.default]
        seen: set[fx.Node] = set()
        todo = [node, *kept]
        while todo:
            one = todo.pop()
            if one in seen or one.op != "call_function" or (one in sources and one is not node):
                continue
            seen.add(one)
            stack = one.meta.get("nn_module_stack") or {}
            one.meta["nn_module_stack"] = stack if _SITE in stack else {_SITE: (site.label, nn.Module), **stack}
            todo += [n for n in one.all_input_nodes if n is not node.args[0]]


# ---------------------------------------------------------------- reading Inductor


@dataclass(frozen=True, kw_only=True)
class _Lowered:
    """One graph as Inductor schedules it. ``outputs``: node → its allocation and that one's bytes."""

    gm: fx.GraphModule
    backward: bool
    kernels: tuple[Kernel, ...] = ()
    outputs: Mapping[fx.Node, tuple[str, sympy.Expr]]
    inputs: frozenset[str] = frozenset()
    open: frozenset[sympy.Symbol] = frozenset()


def _recorder(found: list[_Lowered]) -> Callable[..., Any]:
    """An ``inner_compile`` that appends what it is given, scheduled, and compiles nothing."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    def schedule(graph: Any) -> Any:
        _report_strides(graph)
        graph.init_wrapper_code()
        graph._update_scheduler()
        raise _Scheduled(_reading(graph))

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        partitioned = copied(gm)  # Inductor's post-grad passes rewrite the graph, and rename nodes
        backward = bool(settings.get("is_backward"))
        outputs = partitioned.graph.find_nodes(op="output")[0].args[0]
        read: dict[str, Any] = {"storages": [None] * len(outputs)}
        try:
            with mock.patch.object(GraphLowering, "compile_to_module", schedule):
                compile_fx_inner(gm, example_inputs, **settings)  # returns where there is nothing to compile
        except _Scheduled as scheduled:
            (read,) = scheduled.args
        known = zip(outputs, read.pop("storages"), strict=True)
        named = {node: where for node, where in known if isinstance(node, fx.Node) and where is not None}
        found.append(_Lowered(gm=partitioned, backward=backward, outputs=named, **read))
        return _stop

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
    """The fields of `_Lowered` that Inductor knows; inside its graph handler."""
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


def _kernel(graph: Any, node: Any) -> Kernel:
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
        return Kernel(reads=(), writes=())
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

    return Kernel(reads=accesses(reads - writes, "reads"), writes=accesses(writes, "writes"))


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
