"""Running a prepared model as `fxquant_eager` does, with a look at every quantized tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backend.eager import aot_eager
from fxquant.backend.quantize import quantize_graph
from fxquant.capture.aside import compiled_aside, evaluating
from fxquant.graph.bodies import execution_order
from fxquant.ops import fake_quantize
from fxquant.plan.plan import Role
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import unwrap

# Called with site key, role, float input, scale, zero point and quantized output; a tensor that it returns goes on
# in the output's place.
Visit = Callable[[str, Role, Tensor, Tensor, Tensor, Tensor], Tensor | None]


class _Recording:
    """A recording in progress: what to call, by which names."""

    def __init__(self, model: nn.Module, visit: Visit) -> None:
        self.visit = visit
        self.keys = {id(q.min_val): key for key, q in quantizers(model) if q.stateful}
        self.seen: dict[str, int] = {}

    def numbered(self, key: str) -> str:
        """``key``, ``key@1``, … for uses of one site in one run."""
        number = self.seen[key] = self.seen.get(key, -1) + 1
        return f"{key}@{number}" if number else key


_current: _Recording | None = None


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, visit: Visit) -> Any:
    """Evaluates ``model`` through AOTAutograd and eager kernels; ``visit`` sees each site as it is computed.

    Keys are the plan's; a site that is used again in the same run is called ``key@1``. Modes are restored.
    Returns the model's output.
    """
    global _current
    model = unwrap(model)
    _current = _Recording(model, visit)
    try:
        with evaluating(model), torch.no_grad(), compiled_aside(model, _recording_backend, dynamic=False) as run:
            return run(*args, **dict(kwargs or {}))
    finally:
        _current = None


def _recording_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Graphs of a recording; whose state they run with shows at run time only, since instances share them."""
    captured = quantize_graph(gm, example_inputs)
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    sites = [
        _Site(site.label, site.role, placeholders.index(site.state[0]) if site.state else None)
        for node in execution_order(captured)
        if node.target in fake_quantize.FAKE_QUANTIZE
        for site in (node.meta["site"],)
    ]
    inputs: list[Any] = []
    compiled = aot_eager(captured, example_inputs, lambda graph: _Visitor(graph, sites, inputs).run)

    def run(*given: Any) -> Any:
        inputs[:] = given
        try:
            return compiled(*given)
        finally:
            inputs.clear()

    return run


@dataclass(frozen=True)
class _Site:
    label: str
    role: Role
    state: int | None  # which graph input holds its minimum

    def key(self, recording: _Recording, inputs: Sequence[Any]) -> str:
        """The plan's key: known by the state tensor, since instances of a class share a graph."""
        return self.label if self.state is None else recording.keys.get(id(inputs[self.state]), self.label)


class _Visitor(fx.Interpreter):
    """Interprets an AOT graph; its fake-quant nodes stand in the order of the captured graph's."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[_Site], inputs: Sequence[Any]) -> None:
        super().__init__(gm)
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in fake_quantize.FAKE_QUANTIZE]
        assert len(nodes) == len(sites), "AOTAutograd keeps every fake-quant node, in order"
        self.sites = dict(zip(nodes, sites, strict=True))
        self.inputs = inputs

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.sites and _current is not None:
            site = self.sites[n]
            args, _ = self.fetch_args_kwargs_from_env(n)
            key = _current.numbered(site.key(_current, self.inputs))
            x, scale, zero_point = args[:3]
            instead = _current.visit(key, site.role, x, scale, zero_point, value)
            return value if instead is None else instead
        return value
