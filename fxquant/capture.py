"""One IR for all passes: a Dynamo graph, or a module under torch.export, as an ATen training graph.

Nodes are functional-style ATen calls (`aten.conv2d`, `aten.linear`, `aten.batch_norm` …) with ``val`` (fake value),
``nn_module_stack`` and ``stack_trace`` in their meta. Touches private torch API; each use says on which
versions it was tried.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._guards import TracingContext  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.utils import reenter_make_fx  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap  # private; tried on 2.13 and 2.15
from torch._ops import HigherOrderOperator
from torch.fx.experimental import proxy_tensor

from fxquant.passes.base import drop_dead_nodes
from fxquant.regions import dissolve_exported, has_transforms, outline_transforms, silence
from fxquant.resolve import tell_calls_apart


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same attributes."""
    graph = fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, names))
    for old, new in names.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


class _Retrace(fx.Interpreter):
    """Runs a Dynamo graph under make_fx, keeping whole what must not be traced through."""

    def __init__(self, gm: fx.GraphModule, inline_checkpoints: bool = False) -> None:
        super().__init__(outline_transforms(copied(gm)) if has_transforms(gm) else gm)
        self.inline_checkpoints = inline_checkpoints

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is tag_activation_checkpoint:
            if self.inline_checkpoints:
                return self._inline(args)
            return self._keep(target, args, kwargs, 1, _Retrace(args[0]).run)
        if target is invoke_subgraph:  # a region that is compiled once for all its calls: each has sites of its own
            return _Retrace(args[0], self.inline_checkpoints).run(*args[2:])
        if target is wrap:
            return self._keep(target, args, kwargs, 1)
        if isinstance(target, HigherOrderOperator) and target.name() == "autograd_function_apply":
            return self._keep(target, args, kwargs, 2)
        return super().call_function(target, args, kwargs)

    def _inline(self, args: tuple[Any, ...]) -> Any:
        """Dissolves a checkpointed body, marking the nodes it makes with a region of their own."""
        mode = proxy_tensor.get_proxy_mode()  # private; tried on 2.13 and 2.15
        if mode is None:  # a body of a body, run for its values
            return _Retrace(args[0], inline_checkpoints=True).run(*args[1:])
        graph = mode.tracer.graph
        before = len(graph.nodes)
        value = _Retrace(args[0], inline_checkpoints=True).run(*args[1:])
        for node in list(graph.nodes)[before:]:
            node.meta.setdefault("region", f"checkpoint{before}")
        return value

    def _keep(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bodies: int,
        retraced: Callable[..., Any] | None = None,
    ) -> Any:
        """Records one call with its nested graphs as submodules.

        A checkpointed body is ``retraced`` to ATen, since it holds sites. The two bodies of a custom
        autograd.Function, and the body of a `torch.func` transform, stay as Dynamo wrote them: tracing through
        the first would drop its backward, and values inside the second are wrapped.
        """
        mode = proxy_tensor.get_proxy_mode()  # private; tried on 2.13 and 2.15
        operands = args[bodies:]
        run = retraced or functools.partial(target, *args[:bodies])
        if mode is None:  # in a body that is run for its values
            return run(*operands, **({} if retraced else kwargs))
        tracer: Any = mode.tracer
        with proxy_tensor.disable_proxy_modes_tracing():
            value = run(*operands, **({} if retraced else kwargs))
        proxies = []
        for body in args[:bodies]:
            if retraced:
                meta = body.meta
                body = _without_dead_nodes(reenter_make_fx(retraced)(*operands))
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
    _keep_static_inputs(gm, traced)
    silence(traced)
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


def _keep_static_inputs(gm: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Keeps what AOTAutograd reads off a graph of Dynamo's: which inputs stay at their address, and all sources.

    Without it no input is known to be a parameter or buffer: CUDA graphs would copy each of them in every step, and
    refuse a graph that updates a buffer.
    """
    if "dynamo_compile_id" not in gm.meta:  # a graph of somebody else's; private, as all here; tried on 2.13 and 2.15
        return
    from torch._dynamo.source import ConstantSource

    olds, news = (g.graph.find_nodes(op="placeholder") for g in (gm, traced))
    for old, new in zip(olds, news, strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
        new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})
    constants = {name: ConstantSource(name) for name, _ in traced.named_buffers(remove_duplicate=False)}
    traced._param_name_to_source = {**getattr(gm, "_param_name_to_source", {}), **constants}  # type: ignore[assignment]
    traced.meta["dynamo_compile_id"] = gm.meta["dynamo_compile_id"]


def in_compiled_region() -> bool:
    """Whether plain Python is running inside a torch.compile call, that is, Dynamo left this frame eager."""
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:  # private; tried on 2.13 and 2.15
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

    Parameters and buffers are get_attr nodes, all in front, named by their paths in the model; modules have the first
    of their paths. Autocast is a way to train: the graph computes in the precision of the parameters.
    """
    with _as_deployed():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    dissolve_exported(gm)
    outline_transforms(gm)
    silence(gm)
    _call_by_first_path(gm, model)
    tell_calls_apart(gm)
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and node is not first:
            first.prepend(node)
    return _without_dead_nodes(gm)


def _call_by_first_path(gm: fx.GraphModule, model: torch.nn.Module) -> None:
    """In ``nn_module_stack``, a module that has several paths gets the first, by which the plan knows it."""
    first: dict[int, str] = {}
    names = {path: first.setdefault(id(m), path) for path, m in model.named_modules(remove_duplicate=False)}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(names.get(path, path) != path for path, _ in stack.values()):
            node.meta["nn_module_stack"] = {k: (names.get(path, path), kind) for k, (path, kind) in stack.items()}


@contextlib.contextmanager
def _as_deployed() -> Iterator[None]:
    """Inside, autocast and regions that are compiled once for all their calls are what they enclose."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: torch.autocast) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = wanted

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with (
        mock.patch.object(torch.autocast, "__enter__", enter_disabled),
        mock.patch("torch._higher_order_ops.invoke_subgraph.invoke_subgraph_placeholder", call),
    ):
        yield


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
    """``torch.compile(model, backend=backend)`` that leaves no trace on the model or in recompile counts."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not before torch 2.13
        options["isolate_recompiles"] = True
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    # Private; tried on 2.13 and 2.15: the wrapper's, which passes what is set on it to the model.
    mark = "_is_torch_compile"
    marked = mark in vars(model)
    try:
        with torch._dynamo.config.patch(limits):
            yield torch.compile(model, backend=backend, **options)
    finally:
        if not marked:
            vars(model).pop(mark, None)


def dynamo_graphs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """Every graph that Dynamo makes of one call, retraced to ATen with checkpointed bodies inlined.

    The model really runs, op by op; see `untouched`. Errors of the model come through unchanged. A graph's
    ``meta["parameters"]`` holds the ids of the parameters that it reads, ``meta["runs"]`` how often the call ran it.
    """
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found = capture(gm, example_inputs, inline_checkpoints=True)
        found.meta["parameters"] = {id(v) for v in example_inputs if isinstance(v, torch.nn.Parameter)}
        found.meta["runs"] = 0
        graphs.append(found)

        def run(*inputs: Any) -> Any:
            found.meta["runs"] += 1
            return gm.forward(*inputs)

        return run

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
