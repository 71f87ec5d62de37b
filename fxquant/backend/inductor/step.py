"""What Inductor makes of one training step, up to the kernels that it would write and compile.

Touches private torch API; tried on 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxquant.backend.inductor.compile import compile_quantized
from fxquant.backend.inductor.scheduled import Lowered, ScheduledKernel, Stopped, recorder, stop
from fxquant.backend.quantize import quantize_graph
from fxquant.backend.reports import unreported
from fxquant.capture.aside import compiled_aside, untouched
from fxquant.errors import InvalidArgument, UnsupportedModel
from fxquant.graph import meta
from fxquant.graph.bodies import execution_order, nested_graphs
from fxquant.graph.nodes import is_bind
from fxquant.graph.views import FakeQuant
from fxquant.prepared.quantizer import quantizers
from fxquant.support.table import short

_SITE = "fxquant.site"  # a frame in nn_module_stack: passes and AOTAutograd hand it on to what they make of a node


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
    kernels: tuple[ScheduledKernel, ...]
    kept: tuple[Kept, ...]
    open: frozenset[sympy.Symbol]


def site_of(node: fx.Node) -> str | None:
    """The quantizer that a node of either graph computes for, or computes the gradient of."""
    for stack in (node.meta.get("nn_module_stack"), node.meta.get("fwd_nn_module_stack")):
        if stack and _SITE in stack:
            return str(stack[_SITE][0])
    return None


def trace_step(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    quantized: bool,
    batch: int | None,
    options: Mapping[str, Any] | None = None,
) -> Step:
    """Compiles one training step of a prepared model, forward and backward, and stops before kernels are written.

    The pipeline is the one that training runs, on fake tensors: nothing is computed and the model stays as it was.
    ``quantized=False`` gives plain Inductor on the same model. With ``batch``, dimension 0 of every input of that size
    is left open. ``options`` are the quantizing backend's.

    Raises UnsupportedModel for a graph break and for a size that cannot stay open, InvalidArgument for inputs that do
    not run and for a model with nothing to train.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise _cannot_run(error) from error
    if batch is not None:
        args, kwargs = _opened((args, dict(kwargs)), batch)
    found = _lowered(model, args, kwargs, quantized, options)
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


def _lowered(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    quantized: bool,
    options: Mapping[str, Any] | None,
) -> list[Lowered]:
    """The forward graph, and the backward graph if there is one."""
    found: list[Lowered] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if quantized:
            captured = quantize_graph(gm, example_inputs, options)
            _mark_sites(captured)
            compile_quantized(captured, example_inputs, options=options, inner_compile=recorder(found))
        else:
            from torch._inductor.compile_fx import compile_fx

            compile_fx(_without_binds(gm), example_inputs, inner_compile=recorder(found))
        return stop

    with untouched(model), torch.enable_grad(), _uncached():
        for module in model.modules():
            module.__dict__.pop("_compiled_call_impl", None)  # what `Module.compile` left would run instead
        for _, quantizer in quantizers(model):
            quantizer.resolved = True  # the steps after the first, which may have to set the ranges
        with compiled_aside(model, backend, fullgraph=True, dynamic=False) as compiled:
            _until_stopped(compiled, args, kwargs)
    return found


def _step(forward: Lowered, backward: Lowered) -> Step:
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


def _until_stopped(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    try:
        compiled(*args, **kwargs)
    except Stopped:
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
    """No cache is read, nothing is remembered, and the backward graph is compiled with the forward.

    Other threads' compiles wait: what they learn of sizes and report meanwhile would be forgotten too.
    """
    from torch._dynamo import pgo
    from torch._dynamo.convert_frame import compile_lock
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    off = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    ours = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with compile_lock, unreported(), inductor.patch(off), functorch.patch(ours):
        known = pgo.get_code_state()  # sizes seen before, from which Dynamo guesses what varies
        before = copy.deepcopy(known)
        try:
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
    found = [(view, site) for n in execution_order(gm) if (view := FakeQuant.of(n)) and (site := meta.site_of(n))]
    sources = {view.input for view, _ in found}
    for view, site in found:
        node = view.node
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
            todo += [n for n in one.all_input_nodes if n is not view.input]
