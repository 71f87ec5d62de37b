"""Fake-quant nodes where the plan wants them: from bound state, or stateless for models that were not prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.dependence import changed_in_place
from fxquant.graph.kinds import operands, replace_operand, unit_end
from fxquant.graph.lift import Lifting, Operand, lift
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import is_bind, is_float
from fxquant.ops import fake_quantize
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.site_nodes import Insertion, SiteNodes
from fxquant.passes.stages import CAPTURED
from fxquant.plan.exceptions import Exceptions, weighted
from fxquant.plan.positions import bound_sites, modules_around
from fxquant.plan.solver import place
from fxquant.spec.mode import Mode
from fxquant.spec.ranges.current_tensor import CurrentTensor
from fxquant.spec.recipes import Recipe
from fxquant.spec.rules import Rulebook
from fxquant.targets.profiles import Profile


@dataclass(frozen=True, kw_only=True)
class InsertFakeQuantize(Pass):
    """``conv(x, w)``  →  ``conv(fake_quantize(x, sx, zx), fake_quantize(w, sw, 0))``.

    Scales come from the state that ``bind`` nodes bring (which are erased), updated first in training; where it is
    delayed, or several ranks keep it equal, `BatchRangeUpdates` moves its update to the end of the graph. A graph
    without them is placed on the spot when ``stateless`` is set, ranges taken from the tensors themselves.
    """

    stages: ClassVar = (CAPTURED,)

    recipe: Recipe
    profile: Profile
    stateless: bool = False

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Inserts into ``gm`` and its nested bodies."""
        found, missing = bound_sites(gm)
        for absent in missing:
            self.decline(result, absent.bind, f"the operators of site {absent.site.name} are in another graph")
        by_graph: dict[fx.Graph, list[Insertion]] = {}
        for bound in found:
            insertion = Insertion(
                label=bound.key,
                role=bound.site.role,
                spec=bound.site.spec,
                edges=bound.edges,
                mode=Mode(bound.mode),
                state=bound.state,
                group=process_group(bound.group),
                before=bound.before,
            )
            by_graph.setdefault(bound.bind.graph, []).append(insertion)
        done = 0
        for module in all_graphs(gm):
            insertions = by_graph.get(module.graph, [])
            if self.stateless:
                insertions = self._stateless(module, result)
            if insertions:
                around = _Surroundings(module.graph)
                done += sum(_insert(around, insertion, self.profile.fuses) for insertion in insertions)
            done += _erase_binds(module.graph)
        return done

    def _stateless(self, gm: fx.GraphModule, result: PassResult) -> list[Insertion]:
        graph = gm.graph
        if any(node.op == "call_function" and node.target in fake_quantize.FAKE_QUANTIZE for node in graph.nodes):
            return []
        layers, book = weighted(graph, self.profile), Rulebook(self.recipe.rules)
        ends = (layers[0], layers[-1]) if layers else (None, None)
        found = place(graph, self.recipe, self.profile, Exceptions(book, modules_around(gm), ends))
        for rule in book.unused():
            self.decline(result, next(iter(graph.nodes)), f"{rule} matches nothing in this graph")
        for node, reason in found.declined:
            self.decline(result, node, reason)
        insertions = []
        for number, placed in enumerate(found.placed):
            spec = placed.spec
            if spec.range.stateful:
                spec = dataclasses.replace(spec, range=CurrentTensor())
            label = f"{placed.edges[0][0].name}.{placed.edges[0][1]}.{number}"
            insertions.append(Insertion(label=label, role=placed.role, spec=spec, edges=placed.edges, mode=Mode.STATIC))
        return insertions


def process_group(wanted: str | None) -> str:
    """The name of the group whose ranks reduce ranges together, ``""`` for none: None means all ranks."""
    distributed = torch.distributed
    if wanted == "" or not (distributed.is_available() and distributed.is_initialized()):
        return ""
    if wanted is not None:
        return wanted
    world = distributed.group.WORLD
    return str(world.group_name) if world is not None and world.size() > 1 else ""


def _erase_binds(graph: fx.Graph) -> int:
    binds = [node for node in graph.nodes if is_bind(node)]
    for node in binds:
        graph.erase_node(node)
    return len(binds)


class _Surroundings:
    """What inserting needs to know of a graph, read once before it changes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.changed = changed_in_place(graph)
        self.last_input = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)

    def lift(self, edges: Iterable[Operand]) -> Lifting:
        """As `fxquant.plan.solver` lifts. Through active dropout too: its input is the tensor that is deployed, its
        output is that tensor's codes at another scale, which would widen the range for nothing."""
        return lift(edges, lambda node: passes_values(node) and node.all_input_nodes[0] not in self.changed)

    def after(self, source: fx.Node, state: tuple[fx.Node, ...]) -> fx.Node:
        """The node after which others may read ``source`` and ``state``."""
        if source not in self.order:
            return source  # inserted by another site, after all inputs
        inputs = (node for node in (self.last_input, *state) if node is not None)
        return max((source, *inputs), key=self.order.__getitem__)


def _insert(around: _Surroundings, site: Insertion, fuses: frozenset[str]) -> int:
    """Inserts one site; returns in how many places."""
    if site.mode is Mode.OFF:
        return 0
    moved = site.role == "activation" and site.spec.group_size is None  # groups run along an axis of the operand
    lifting = around.lift(site.edges) if moved else Lifting(set(site.edges))
    if site.role == "output":
        sources = dict.fromkeys(unit_end(node, fuses) for node, _ in site.edges)
    else:
        sources = dict.fromkeys(lifting.source(edge) for edge in site.edges)
    done = 0
    for source in sources:
        if not is_float(source):
            continue
        done += 1
        users = list(source.users)
        with around.graph.inserting_after(around.after(source, site.state)):
            quantized = SiteNodes(around.graph, source, site).quantized()
        if quantized is None:
            continue
        for user in users:
            if site.role == "output" or user in lifting.lifted:
                user.replace_input_with(source, quantized)
        for node, name in site.edges:
            if operands(node).get(name) is source:
                replace_operand(node, name, quantized)
        if site.mode.updates_afterwards:
            _observe_after(around, source, site, quantized)
    return done


def _observe_after(around: _Surroundings, source: fx.Node, site: Insertion, quantized: fx.Node) -> None:
    """Observes a tensor whose update nothing waits for.

    After the first reader of the quantized tensor: Inductor takes a reduction into a loop over the same elements
    when the loop comes first, and the loop comes where its reader needs it.
    """
    order = around.order
    readers = [user for user in quantized.users if user in order and user.op != "output"]
    last = quantized if source in around.changed else min(readers, key=order.__getitem__, default=quantized)
    with around.graph.inserting_after(last):
        SiteNodes(around.graph, source, site).observe()
