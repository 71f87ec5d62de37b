"""A Dynamo graph as an ATen training graph.

Nodes are functional-style ATen calls (`aten.conv2d`, `aten.linear`, `aten.batch_norm` …) with ``val`` (fake value),
``nn_module_stack`` and ``stack_trace`` in their meta. Touches private torch API; each use says on which
versions it was tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.utils import reenter_make_fx  # private; tried on 2.13 and 2.15
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap  # private; tried on 2.13 and 2.15
from torch._ops import HigherOrderOperator
from torch.fx.experimental import proxy_tensor

from fxquant.capture.aside import compiled_aside
from fxquant.capture.cuts import cut_of
from fxquant.capture.sharded import refuse_sharded
from fxquant.graph.bodies import execution_order
from fxquant.graph.edit import copied, without_dead_nodes
from fxquant.graph.meta import REGION, SOURCE, STATE
from fxquant.graph.static_inputs import is_of_dynamo, keep_sources, sources_of, stand_for
from fxquant.passes.captured.silence_bodies import SilenceBodies
from fxquant.passes.dynamo.outline_transforms import OutlineTransforms, has_transforms
from fxquant.passes.stages import CAPTURED, DYNAMO
from fxquant.plan.positions import tell_calls_apart


def autocast_of(gm: fx.GraphModule) -> torch.dtype | None:
    """The type that autocast gives products in a graph of Dynamo's, around the call or within; None without one."""
    for node in execution_order(gm):
        if node.target is torch.amp.autocast_mode._enter_autocast:
            given: tuple[Any, ...] = (*node.args, None, True)
            if given[2]:
                return given[1] or torch.get_autocast_dtype(given[0])
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


class _Retrace(fx.Interpreter):
    """Runs a Dynamo graph under make_fx, keeping whole what must not be traced through."""

    def __init__(self, gm: fx.GraphModule, inline_checkpoints: bool = False) -> None:
        super().__init__(_outlined(gm))
        self.inline_checkpoints = inline_checkpoints
        self.autocasts: list[torch.autocast] = []  # entered, innermost last

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As a graph runs; autocast that an error leaves on is left."""
        try:
            return super().run(*args, **kwargs)
        finally:
            while self.autocasts:
                self.autocasts.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            return self._autocast(*args)
        if target is torch.amp.autocast_mode._exit_autocast:
            return self.autocasts.pop().__exit__(None, None, None)
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

    def _autocast(self, device: str, *rest: Any) -> None:
        """Enters autocast, which records that too. Private `_enter_autocast`, tried on 2.13, is recorded, not run."""
        self.autocasts.append(torch.autocast(device, *rest))
        self.autocasts[-1].__enter__()

    def _inline(self, args: tuple[Any, ...]) -> Any:
        """Dissolves a checkpointed body, marking the nodes it makes with a region of their own."""
        mode = proxy_tensor.get_proxy_mode()  # private; tried on 2.13 and 2.15
        if mode is None:  # a body of a body, run for its values
            return _Retrace(args[0], inline_checkpoints=True).run(*args[1:])
        graph = mode.tracer.graph
        before = len(graph.nodes)
        value = _Retrace(args[0], inline_checkpoints=True).run(*args[1:])
        for node in list(graph.nodes)[before:]:
            node.meta.setdefault(REGION, f"checkpoint{before}")
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
                body = without_dead_nodes(reenter_make_fx(retraced)(*operands))
                body.meta.update(meta)
            name = tracer.get_fresh_qualname("nested_graph")
            tracer.root.register_module(name, body)
            proxies.append(tracer.create_proxy("get_attr", name, (), {}))
        proxies += torch.utils._pytree.tree_map(tracer.unwrap_proxy, tuple(operands))
        call = tracer.create_proxy("call_function", target, tuple(proxies), kwargs)
        return proxy_tensor.track_tensor_tree(value, call, constant=None, tracer=tracer)


def _outlined(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which transforms are one call each, or the graph itself where it has none."""
    if not has_transforms(gm):
        return gm
    outlined = copied(gm)
    OutlineTransforms().run(outlined, DYNAMO)
    return outlined


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
    _refuse_sharded(example_inputs)
    context = TracingContext.get()
    fakes = _fake_inputs(gm, example_inputs, context)
    assert context.fake_mode is not None
    with context.fake_mode, torch.fx.traceback.preserve_node_meta():
        traced = proxy_tensor.make_fx(_Retrace(gm, inline_checkpoints).run, pre_dispatch=True)(*fakes)
    _describe_placeholders(gm, traced, example_inputs)
    _keep_static_inputs(gm, traced)
    SilenceBodies().run(traced, CAPTURED)
    tell_calls_apart(traced)
    return without_dead_nodes(traced)


def _refuse_sharded(example_inputs: Sequence[Any]) -> None:
    """Raises UnsupportedModel for DTensors: they have neither proxies of make_fx, nor rules for our operators."""
    refuse_sharded(example_inputs)


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
        new.meta[SOURCE] = source
        new.meta[STATE] = trainable or "._parameters[" in source or "._buffers[" in source


def _keep_static_inputs(gm: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Keeps what AOTAutograd reads off a graph of Dynamo's, see `fxquant.graph.static_inputs`."""
    if not is_of_dynamo(gm):
        return
    from torch._dynamo.source import ConstantSource  # private; tried on 2.13 and 2.15

    olds, news = (g.graph.find_nodes(op="placeholder") for g in (gm, traced))
    for old, new in zip(olds, news, strict=True):
        keep_sources(new, old)
    constants = {name: ConstantSource(name) for name, _ in traced.named_buffers(remove_duplicate=False)}
    stand_for(traced, gm, {**sources_of(gm), **constants})


def dynamo_graphs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """Every graph that Dynamo makes of one call, retraced to ATen with checkpointed bodies inlined.

    The model really runs, op by op; see `untouched`. Errors of the model come through unchanged. A graph's
    ``meta["parameters"]`` holds the ids of the parameters that it reads, ``meta["runs"]`` how often the call ran it,
    ``meta["cut"]`` why it ends before its frame does.
    """
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found = capture(gm, example_inputs, inline_checkpoints=True)
        found.meta["parameters"] = {id(v) for v in example_inputs if isinstance(v, torch.nn.Parameter)}
        found.meta["runs"], found.meta["cut"] = 0, cut_of(gm)
        graphs.append(found)

        def run(*inputs: Any) -> Any:
            found.meta["runs"] += 1
            return gm.forward(*inputs)

        return run

    with torch.inference_mode(False), torch.enable_grad(), compiled_aside(model, record, dynamic=False) as compiled:
        args, kwargs = torch.utils._pytree.tree_map(_usable, (args, kwargs))
        compiled(*args, **kwargs)
    return graphs


def _usable(value: Any) -> Any:
    """A copy of an inference tensor, which no operator with a gradient takes."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value
