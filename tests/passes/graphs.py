"""Real ATen graphs for the passes: captured as the backends do, before any pass has run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backend.eager import aot_eager
from fxquant.capture.dynamo import capture
from fxquant.graph.arguments import named_arguments
from fxquant.graph.bodies import all_graphs
from fxquant.graph.nodes import call_nodes
from fxquant.passes.base import Pass, PassResult, run_all
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME

INSERT = InsertFakeQuantize(recipe=INT8, profile=ONNXRUNTIME, stateless=True)
QUANTIZE: tuple[Pass, ...] = (FunctionalizeActivations(), INSERT)


def captured(model: Callable[..., Any], *args: Any, passes: Sequence[Pass] = ()) -> fx.GraphModule:
    """The ATen training graph of one call, after ``passes``."""
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(capture(gm, inputs))
        run_all(passes, graphs[-1])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=record)(*args)
    assert len(graphs) == 1, "the model broke into several graphs"
    return graphs[0]


def quantizing(*passes: Pass) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """A torch.compile backend: capture, passes, AOTAutograd, op by op."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graph = capture(gm, inputs)
        run_all(passes, graph)
        return aot_eager(graph, inputs, lambda each: each)

    return backend


def apply(each: Pass, gm: fx.GraphModule) -> PassResult:
    """Runs a pass, and again to see that the second run changes nothing."""
    result = each.run(gm)
    code, nodes = gm.code, list(gm.graph.nodes)
    again = each.run(gm)
    assert not again.modified and again.rewrites == 0
    assert gm.code == code and list(gm.graph.nodes) == nodes
    return result


def untouched(each: Pass, gm: fx.GraphModule) -> PassResult:
    """Runs a pass that must change nothing."""
    code, nodes, compiled = gm.code, list(gm.graph.nodes), gm.forward
    result = each.run(gm)
    assert not result.modified and result.rewrites == 0
    assert gm.code == code and list(gm.graph.nodes) == nodes and gm.forward == compiled
    return result


def evaluate(gm: fx.GraphModule, model: Callable[..., Any], *args: Tensor) -> Tensor:
    """The captured graph's first result; Dynamo orders its inputs by use, so they are found by their names."""
    names = dict(zip(inspect.signature(model).parameters, args, strict=False))
    sources = [node.meta["source"] for node in gm.graph.nodes if node.op == "placeholder"]
    return gm(*(names[source.removeprefix("L['").removesuffix("']")] for source in sources))[0]


def by_keyword(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every argument of every operator by keyword."""
    for module in all_graphs(gm):
        for node in call_nodes(module.graph):
            if isinstance(node.target, torch._ops.OpOverload):
                named = named_arguments(node)
                node.args, node.kwargs = (), named
        module.recompile()
    return gm


def show(gm: fx.GraphModule) -> str:
    """One line a node: ``name = op(arguments)``; inputs and constants of shape left out."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            arguments = ", ".join(_argument(a) for a in node.args)
            lines.append(f"{node.name} = {_op(node)}({arguments})")
        elif node.op == "call_module":
            lines.append(f"{node.name} = {node.target}({', '.join(map(_argument, node.args))})")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
    return "\n".join(lines) + "\n"


def _op(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].removesuffix("_affine")
    return node.target.__name__


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value)
