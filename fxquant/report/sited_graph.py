"""A graph without quantizers, and where those of a plan would stand in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxquant.graph.dependence import changed_in_place, constant_nodes
from fxquant.graph.kinds import bias_of, operands, unit_end
from fxquant.graph.lift import Lifting, Operand, lift
from fxquant.graph.meta import region_of
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import call_nodes, packet
from fxquant.graph.views import Bind
from fxquant.plan.plan import Plan, Site
from fxquant.plan.positions import Positions, enclosing, modules_around, positions
from fxquant.report.forecast import Place, absolute, place_of
from fxquant.targets.profiles import get_profile

aten = torch.ops.aten

# Kinds whose kernels have BatchNorm and activation in them, where the target's profile says that it fuses those.
_FUSING = frozenset({"conv", "conv_transpose", "add"})


class SitedGraph:
    """One graph and the sites of the plan in it.

    Attributes:
        located: operand → the site that serves it, and its operator in the plan.
        sources: operand → the node whose tensor the site quantizes.
        carried: a value that is codes for all its users → whose.
        lifted: an operator that moves codes → whose.
        heads: what a runtime computes inside the kernel of the operator before it → that operator.
    """

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm, self.plan, self.graph = gm, plan, gm.graph
        self.fuses = get_profile(plan.target).fuses
        self.constants = constant_nodes(self.graph)
        self.around = modules_around(gm)
        self.located = _locate(gm, plan)
        self.sources: dict[Operand, fx.Node] = {}
        self.carried: dict[fx.Node, Site] = {}
        self.lifted: dict[fx.Node, Site] = {}
        self._follow()
        self.heads = self._heads()

    def _follow(self) -> None:
        """Finds the tensor of every site, as `fxquant.passes.captured.insert_fake_quantize` does."""
        changed = changed_in_place(self.graph)
        by_site: dict[str, list[Operand]] = {}
        for operand, (site, _) in self.located.items():
            by_site.setdefault(site.key, []).append(operand)
        for served in by_site.values():
            site = self.located[served[0]][0]
            if site.local.role == "output":
                ends = {operand: unit_end(operand[0], self.fuses) for operand in served}
                self.sources.update(ends)
                self.carried.update(dict.fromkeys(ends.values(), site))
            elif site.local.role == "weight":
                self.sources.update((operand, operands(operand[0])[operand[1]]) for operand in served)
            else:
                lifting = lift(served, lambda n: passes_values(n) and n.all_input_nodes[0] not in changed)
                self.sources.update((operand, lifting.source(operand)) for operand in served)
                self.lifted.update(dict.fromkeys(lifting.lifted, site))
        for node in call_nodes(self.graph):
            if passes_values(node) and node.all_input_nodes and node.all_input_nodes[0] in self.carried:
                self.carried.setdefault(node, self.carried[node.all_input_nodes[0]])

    def _heads(self) -> dict[fx.Node, Place]:
        heads: dict[fx.Node, Place] = {}
        for (node, _), (_, place) in self.located.items():
            end = unit_end(node, self.fuses) if place[1] in _FUSING else node
            while end is not node:
                heads[end] = place
                end = end.all_input_nodes[0]
        return heads

    def site(self, node: fx.Node, name: str, value: fx.Node) -> str | None:
        """Key of the quantizer whose codes the operand carries."""
        if (node, name) in self.located:
            return self.located[node, name][0].key
        if value in self.carried:
            return self.carried[value].key
        return self.lifted[node].key if node in self.lifted else None

    def edge(self, node: fx.Node, name: str) -> str:
        """The edge of the plan that the operand is, as the whole model names it; empty where it is none."""
        if (node, name) not in self.located:
            return ""
        path, kind, ordinal = self.located[node, name][1]
        return f"{path + '.' if path else ''}{kind}{ordinal}.{name}"

    def place(self, node: fx.Node) -> Place | None:
        """Which operator of the plan the node is; None for those that no site serves."""
        names = (*operands(node), "output")
        return next((self.located[node, name][1] for name in names if (node, name) in self.located), None)

    def path(self, node: fx.Node) -> str:
        """The module that runs the node, as the whole model names it."""
        return str(self.around(node)[-1][0])

    def own_places(self) -> dict[fx.Node, Place]:
        """Every operator that placement knows, as the module that runs it counts it in one call, site or not."""
        places: dict[fx.Node, Place] = {}
        for (_, below, kind, ordinal), node in positions(self.gm).items():
            if not below:  # of all the calls around a node the innermost comes last
                places[node] = (self.path(node), kind, ordinal)
        return places

    def keys_by_tensor(self) -> list[list[str]]:
        """Keys of the sites on each quantized tensor."""
        keys: dict[fx.Node, dict[str, None]] = {}
        for operand, source in self.sources.items():
            keys.setdefault(source, {})[self.located[operand][0].key] = None
        return [list(those) for those in keys.values()]

    def served(self) -> Iterable[tuple[Place, str, str]]:
        """Operator, operand and site key, for every operand that is quantized.

        What an outer owner counts as the second call of a module, the module's own sites count as one of its own.
        """
        places = dict.fromkeys((node, place) for (node, _), (_, place) in self.located.items())
        for node, place in places:
            for name, value in operands(node).items():
                key = self.site(node, name, value)
                if key is not None:
                    yield place, name, key

    def results(self) -> Iterable[tuple[Place, bool]]:
        """Whether the result of each operator of the plan is quantized, after what is fused into it."""
        lifting = Lifting(set(self.located), set(self.lifted))
        needs = get_profile(self.plan.target).needs_output
        for (node, _), (_, place) in self.located.items():
            fused = place[1] in needs
            end = unit_end(node, self.fuses) if fused else node
            # Where the bias is a node of its own, what is quantized is its sum, and the product is not.
            yield place, (fused or not _adds_bias(node)) and (end in self.carried or lifting.covers(end))


def _locate(gm: fx.GraphModule, plan: Plan) -> dict[Operand, tuple[Site, Place]]:
    """Every operand of the graph that a site of the plan serves; outer owners first, as in compiled graphs."""
    starts: dict[tuple[str, Any], str] = {}
    for node in call_nodes(gm.graph):
        bind = Bind.of(node)
        if bind is not None:
            starts.setdefault((enclosing(node, "")[-1].key, region_of(node)), bind.key)
    places = Positions(gm)
    located: dict[Operand, tuple[Site, Place]] = {}
    for site in sorted(plan.sites, key=lambda site: len(site.owner)):
        for (key, region), path in starts.items():
            for edge in site.local.edges if path == site.owner else ():
                served = places.find(key, edge)
                if served is not None and region_of(served) == region:
                    located.setdefault((served, edge.operand), (site, place_of(absolute(site, edge))))
    return located


def _adds_bias(node: fx.Node) -> bool:
    if packet(node) is aten.linear:
        return bias_of(node) is not None
    return packet(node) in (aten.addmm, aten.baddbmm)
