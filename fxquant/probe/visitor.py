"""Runs of a prepared model with a say about every quantized tensor: the one interpreter of `record` and `sweep`."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backend.eager import aot_eager
from fxquant.backend.quantize import quantize_graph
from fxquant.capture.aside import compiled_aside, evaluating
from fxquant.graph.bodies import execution_order
from fxquant.graph.views import FakeQuant
from fxquant.plan.plan import Role
from fxquant.probe.site_keys import GraphSite, SiteKeys


@dataclass(frozen=True, kw_only=True)
class Use:
    """One run of a fake-quant node.

    Attributes:
        keys: the plan's keys of the sites on the tensor, of which the first one's quantizer runs; never empty.
        role: that site's.
        input: the float tensor.
        scale, zero_point: what it is quantized with.
        axis: the dimension of ``input`` with a scale for each slice; None for one scale.
        element: the small float that its codes are; None for integers.
    """

    keys: tuple[str, ...]
    role: Role
    input: Tensor
    scale: Tensor
    zero_point: Tensor
    compute: Callable[[], Tensor] = field(repr=False)
    axis: int | None = None
    element: str | None = None

    @functools.cached_property
    def quantized(self) -> Tensor:
        """The tensor after the quantizer, computed when the visit first asks for it."""
        return self.compute()


# What goes on in the quantized tensor's place; None for that tensor itself.
Visit = Callable[[Use], Tensor | None]
Run = Callable[[tuple[Any, ...], Mapping[str, Any], Visit], Any]  # (args, kwargs, visit) → the model's output
Keys = Sequence[tuple[str, ...]]
# Called with each graph and its fake-quant nodes as it is compiled; what it returns is called each time that the graph
# runs, with the keys of those nodes: none of one that the model calls itself.
Watch = Callable[[fx.GraphModule, Sequence[fx.Node]], Callable[[Keys], None]]


@contextlib.contextmanager
def visiting(model: nn.Module, caller: str, watch: Watch | None = None) -> Iterator[Run]:
    """A way to run a prepared model in eval mode through AOTAutograd and eager kernels, each site visited in turn.

    The model is compiled once for each shape of its inputs, without gradients and aside from the user's own compiles.
    Its modules' modes are restored at the end. ``caller`` is who wants it, for the error of an unprepared model.
    """
    probe = _Probe(SiteKeys(model, caller), watch)
    with evaluating(model), torch.no_grad(), compiled_aside(model, probe.backend, dynamic=False) as step:

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any], visit: Visit) -> Any:
            probe.visit = visit
            try:
                return step(*args, **kwargs)
            finally:
                probe.visit = _let_pass

        yield run


def _let_pass(use: Use) -> None:
    """The visit of no run: everything goes on as it is."""


class _Probe:
    """A backend for one model: its graphs ask here who visits their sites in the run in hand.

    Dynamo keeps it as long as the compiled code lives, so it holds no model.
    """

    def __init__(self, keys: SiteKeys, watch: Watch | None) -> None:
        self.keys, self.watch = keys, watch
        self.visit: Visit = _let_pass

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a graph of Dynamo's."""
        captured = quantize_graph(gm, example_inputs)
        nodes = [node for node in execution_order(captured) if FakeQuant.of(node)]
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        sites = [GraphSite.of(node, placeholders) for node in nodes]
        ran = self.watch(captured, nodes) if self.watch else None
        keys: list[tuple[str, ...]] = []

        def interpreted(graph: fx.GraphModule) -> Callable[..., Any]:
            return _Interpreter(graph, sites, keys, self).run

        compiled = aot_eager(captured, example_inputs, interpreted)

        def run(*inputs: Any) -> Any:
            keys[:] = [self.keys.resolve(site, inputs) if site else () for site in sites]
            if ran is not None:
                ran(list(keys))
            return compiled(*inputs)

        return run


class _Interpreter(fx.Interpreter):
    """Runs an AOT graph, whose fake-quant nodes stand in the order of the captured graph's."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[GraphSite | None], keys: Keys, probe: _Probe) -> None:
        super().__init__(gm)
        nodes = [node for node in gm.graph.nodes if FakeQuant.of(node)]
        assert len(nodes) == len(sites), "AOTAutograd keeps every fake-quant node, in order"
        numbered = zip(nodes, sites, itertools.count())
        self.sites = {node: (site, number) for node, site, number in numbered if site is not None}
        self.keys, self.probe = keys, probe

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.sites:
            return super().run_node(n)
        site, number = self.sites[n]
        args, _ = self.fetch_args_kwargs_from_env(n)
        view = FakeQuant(n)
        use = Use(
            keys=self.keys[number],
            role=site.role,
            input=args[0],
            scale=args[1],
            zero_point=args[2],
            compute=functools.partial(super().run_node, n),
            axis=view.axis,
            element=view.element,
        )
        instead = self.probe.visit(use)
        return use.quantized if instead is None else instead
