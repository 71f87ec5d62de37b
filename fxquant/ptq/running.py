"""Runs of a prepared model on its captured graph: quantized or in float, with a look at chosen operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backend.quantize import quantize_graph
from fxquant.capture.aside import compiled_aside, evaluating, untouched
from fxquant.errors import InvalidArgument
from fxquant.graph.nodes import is_state
from fxquant.graph.views import FakeQuant
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.prepared.root import require_plan, unwrap
from fxquant.probe.calibrate import arguments_for
from fxquant.probe.site_keys import GraphSite, SiteKeys
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.support.progress import track

# Called as an operator has run: with a way to the values of what it read, and its result.
Seen = Callable[[Callable[[fx.Node], Any], Any], None]
Watch = Callable[[BoundGraph], Mapping[fx.Node, Seen]]


class Running:
    """A way to run a prepared model, see `opened`.

    Attributes:
        plan: of the model.
        graphs: those that ran so far, in the order in which they first did.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        self.caller, self.model = caller, model
        self.plan = require_plan(model, caller)
        self._keys = SiteKeys(model, caller)
        self._bound: dict[tuple[int, ...], BoundGraph] = {}
        self._quantized = True
        self._watch: Watch = _see_nothing
        self.step: Callable[..., Any] = model

    @property
    def graphs(self) -> list[BoundGraph]:
        """Captured graphs with their tensors."""
        return list(self._bound.values())

    def run(self, batch: Any, watch: Watch, *, quantized: bool) -> None:
        """Runs a batch, ``quantized`` or with every site in float; the same random numbers each time."""
        args, kwargs = arguments_for(self.model, batch)
        self._quantized, self._watch = quantized, watch
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices=devices):
                self.step(*args, **kwargs)
        finally:
            self._watch = _see_nothing

    def over(self, batches: Iterable[Any], visit: Callable[[Any], None], description: str, progress: bool) -> None:
        """Calls ``visit`` with each batch, for runs that leave no trace on buffers; InvalidArgument for no batch."""
        count = 0
        with untouched(self.model):
            for batch in track(batches, description, show=progress):
                visit(batch)
                count += 1
        if not count:
            raise InvalidArgument("data must hold at least one batch: got none.")

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a graph of Dynamo's to runs of its captured graph, operator by operator."""
        captured = quantize_graph(gm, example_inputs)
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        found = {node: GraphSite.of(node, placeholders) for node in captured.graph.nodes if FakeQuant.of(node)}
        sites = {node: site for node, site in found.items() if site is not None}

        def run(*inputs: Any) -> Any:
            graph = self._bind(captured, placeholders, sites, inputs)
            return _Interpreter(graph, self._quantized, self._watch(graph)).run(*inputs)

        return run

    def _bind(
        self,
        gm: fx.GraphModule,
        placeholders: Sequence[fx.Node],
        sites: Mapping[fx.Node, GraphSite],
        inputs: Sequence[Any],
    ) -> BoundGraph:
        pairs = zip(placeholders, inputs, strict=True)
        state = {node: value for node, value in pairs if is_state(node) and isinstance(value, Tensor)}
        which = (id(gm), *map(id, state.values()))
        if which not in self._bound:
            keys = {node: self._keys.resolve(site, inputs) for node, site in sites.items()}
            self._bound[which] = BoundGraph(gm, state, keys)
        return self._bound[which]

    def close(self) -> None:
        """Lets go of the model: Dynamo keeps the backend as long as the compiled code lives."""
        self._bound.clear()
        self.model = nn.Module()


@contextlib.contextmanager
def opened(model: nn.Module, caller: str) -> Iterator[Running]:
    """A way to run a prepared model in eval mode, without gradients and aside from the user's own compiles.

    The model is compiled once for each shape of its inputs. Its modules' modes are restored at the end. ``caller`` is
    who wants it, for the error of an unprepared model.
    """
    plain = unwrap(model)
    running = Running(plain, caller)
    try:
        with evaluating(plain), torch.no_grad(), compiled_aside(plain, running.backend, dynamic=False) as step:
            running.step = step
            yield running
    finally:
        running.close()


def _see_nothing(graph: BoundGraph) -> Mapping[fx.Node, Seen]:
    return {}


class _Interpreter(fx.Interpreter):
    """Runs a captured graph; in float, what its sites quantize goes on as it is."""

    def __init__(self, graph: BoundGraph, quantized: bool, watched: Mapping[fx.Node, Seen]) -> None:
        super().__init__(graph.gm)
        self.sites, self.quantized, self.watched = graph.keys, quantized, watched

    def run_node(self, n: fx.Node) -> Any:
        if not self.quantized and (n in self.sites or n.target is FAKE_QUANTIZE_BIAS):
            value = self.fetch_args_kwargs_from_env(n)[0][0]
        else:
            value = super().run_node(n)
        if n in self.watched:
            self.watched[n](self.env.__getitem__, value)
        return value
