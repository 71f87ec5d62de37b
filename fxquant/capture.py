"""One IR for all passes: a Dynamo graph, or a module under torch.export, as an ATen training graph.

Nodes are functional-style ATen calls (`aten.conv2d`, `aten.linear`, `aten.batch_norm` …) with ``val`` (fake value),
``nn_module_stack`` and ``stack_trace`` in their meta. This file and ``backend.py`` are the only ones that touch
private torch API; each use says on which versions it was tried.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext  # private; tried on 2.13
from torch._higher_order_ops.utils import reenter_make_fx  # private; tried on 2.13
from torch._higher_order_ops.wrap import tag_activation_checkpoint  # private; tried on 2.13
from torch._ops import HigherOrderOperator
from torch.fx.experimental import proxy_tensor

from fxquant.passes.base import drop_dead_nodes
from fxquant.resolve import tell_calls_apart


class _Retrace(fx.Interpreter):
    """Runs a Dynamo graph under make_fx, keeping whole what must not be traced through."""

    def __init__(self, gm: fx.GraphModule, inline_checkpoints: bool = False) -> None:
        super().__init__(gm)
        self.inline_checkpoints = inline_checkpoints

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is tag_activation_checkpoint:
            if self.inline_checkpoints:
                return self._inline(args)
            return self._keep(target, args, kwargs, bodies=1)
        if isinstance(target, HigherOrderOperator) and target.name() == "autograd_function_apply":
            return self._keep(target, args, kwargs, bodies=2)
        return super().call_function(target, args, kwargs)

    def _inline(self, args: tuple[Any, ...]) -> Any:
        """Dissolves a checkpointed body, marking the nodes it makes with a region of their own."""
        mode = proxy_tensor.get_proxy_mode()  # private; tried on 2.13
        assert mode is not None, "retracing runs under make_fx"
        graph = mode.tracer.graph
        before = len(graph.nodes)
        value = _Retrace(args[0], inline_checkpoints=True).run(*args[1:])
        for node in list(graph.nodes)[before:]:
            node.meta.setdefault("region", f"checkpoint{before}")
        return value

    def _keep(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], bodies: int) -> Any:
        """Records one call with its nested graphs as submodules.

        A checkpointed body is retraced to ATen, since it holds sites. The two bodies of a custom
        autograd.Function stay as Dynamo wrote them: tracing through the call would drop its backward.
        """
        mode = proxy_tensor.get_proxy_mode()  # private; tried on 2.13
        assert mode is not None, "retracing runs under make_fx"
        tracer: Any = mode.tracer
        operands = args[bodies:]
        with proxy_tensor.disable_proxy_modes_tracing():
            run = _Retrace(args[0]).run if bodies == 1 else functools.partial(target, *args[:bodies])
            value = run(*operands, **({} if bodies == 1 else kwargs))
        proxies = []
        for body in args[:bodies]:
            if bodies == 1:
                meta = body.meta
                body = _without_dead_nodes(reenter_make_fx(_Retrace(body).run)(*operands))
                body.meta.update(meta)
            name = tracer.get_fresh_qualname("nested_graph")
            tracer.root.register_module(name, body)
            proxies.append(tracer.create_proxy("get_attr", name, (), {}))
        proxies += torch.utils._pytree.tree_map(tracer.unwrap_proxy, tuple(operands))
        call = tracer.create_proxy("call_function", target, tuple(proxies), kwargs)
        return proxy_tensor.track_tensor_tree(value, call, constant=None, tracer=tracer)


def _fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], context: TracingContext) -> list[Any]:
    """Dynamo's own fake values for the real inputs, with their symbolic sizes."""
    mode = context.fake_mode
    assert mode is not None, "Dynamo sets a fake mode while it compiles"
    fakes: list[Any] = []
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            fakes.append(node.meta.get("example_value", value))
            continue
        argument = node.meta.get("grapharg")
        fakes.append(
            mode.from_tensor(
                value,
                symbolic_context=context.tensor_to_context.get(value),
                source=argument.source if argument is not None else None,
            )
        )
    return fakes


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any], *, inline_checkpoints: bool = False) -> fx.GraphModule:
    """The Dynamo graph ``gm`` as an ATen training graph; ``gm`` is left as it was.

    Must run inside a torch.compile backend: Dynamo's fake mode and symbolic shapes are used. Placeholders keep
    their order; see `_describe_placeholders` for what they carry. ``inline_checkpoints`` dissolves checkpointed
    bodies, for planning: their nodes are told apart by ``meta["region"]``.
    """
    context = TracingContext.get()
    fakes = _fake_inputs(gm, example_inputs, context)
    assert context.fake_mode is not None
    with context.fake_mode, torch.fx.traceback.preserve_node_meta():
        traced = proxy_tensor.make_fx(_Retrace(gm, inline_checkpoints).run, pre_dispatch=True)(*fakes)
    _describe_placeholders(gm, traced, example_inputs)
    tell_calls_apart(traced)
    return _without_dead_nodes(traced)


def _without_dead_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Without what a model computes for nothing: a site there would have no place in the artifact."""
    drop_dead_nodes(gm.graph)
    gm.recompile()
    return gm


def _describe_placeholders(gm: fx.GraphModule, traced: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Sets ``source`` (Dynamo's path to the value) and ``state`` (a parameter, buffer or other trainable leaf)."""
    olds, news = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (gm, traced))
    for old, new, value in zip(olds, news, example_inputs, strict=True):
        argument = old.meta.get("grapharg")
        source = ""
        if argument is not None and argument.source is not None:
            name = argument.source.name
            source = name if isinstance(name, str) else name()  # a method before torch 2.13
        trainable = isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad
        new.meta["source"] = source
        new.meta["state"] = trainable or "._parameters[" in source or "._buffers[" in source


def is_checkpoint(node: fx.Node) -> bool:
    """Whether the node runs a nested graph under activation checkpointing."""
    return node.op == "call_function" and node.target is tag_activation_checkpoint


def in_compiled_region() -> bool:
    """Whether plain Python is running inside a torch.compile call, that is, Dynamo left this frame eager."""
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:  # private; tried on 2.13
        return True  # also where it is False: behind the recompile limit
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:  # under torch.compiler.disable there is no callback, but the call can be seen
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


def exported_graph(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> fx.GraphModule:
    """The model under torch.export as an ATen training graph that keeps the model's calling convention.

    Parameters and buffers are get_attr nodes, all in front, named by their paths in the model.
    """
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and node is not first:
            first.prepend(node)
    return _without_dead_nodes(gm)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Runs a block and puts buffers, attributes, training flags and random state back, whatever the block did."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    own = [(module, type(module), dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, kind, attributes, registered in own:
            if type(module) is kind:  # a lazy module has become what it stood for
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(registered)


@contextlib.contextmanager
def compiled_aside(model: Any, backend: Callable[..., Any], **options: Any) -> Iterator[Callable[..., Any]]:
    """``torch.compile(model, backend=backend)`` that leaves no trace in the recompile counts of the user's code."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not before torch 2.13
        options["isolate_recompiles"] = True
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    with torch._dynamo.config.patch(limits):
        yield torch.compile(model, backend=backend, **options)


def dynamo_graphs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """Every graph that Dynamo makes of one call, retraced to ATen with checkpointed bodies inlined.

    The model really runs, op by op; see `untouched`. Errors of the model come through unchanged. A graph's
    ``meta["parameters"]`` holds the ids of the parameters that it reads.
    """
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(capture(gm, example_inputs, inline_checkpoints=True))
        graphs[-1].meta["parameters"] = {id(v) for v in example_inputs if isinstance(v, torch.nn.Parameter)}
        return gm.forward

    with torch.enable_grad(), compiled_aside(model, record, dynamic=False) as compiled:
        compiled(*args, **kwargs)
    return graphs


def own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """The function once more, with a code object of its own under ``name``.

    Dynamo counts recompiles, learns dynamic sizes and gives up per code object and its name: of modules that share
    one, each new class would bring the recompile limit nearer, and one that cannot be traced would leave all eager.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
