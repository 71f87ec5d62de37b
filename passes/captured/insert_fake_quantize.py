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
from fxquant.graph.edit import call, item
from fxquant.graph.kinds import operands, replace_operand, unit_end
from fxquant.graph.lift import Lifting, Operand, lift
from fxquant.graph.meta import mark_observation
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import is_bind, is_float, packet
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED
from fxquant.plan.exceptions import Exceptions, weighted
from fxquant.plan.plan import Role
from fxquant.plan.positions import bound_sites, modules_around
from fxquant.plan.solver import place
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor, Fixed, MovingAverage
from fxquant.spec.recipes import Recipe
from fxquant.spec.rules import Rulebook
from fxquant.targets.profiles import Profile

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """One site in one graph.

    ``state`` holds the min and max nodes of a stateful range, ``group`` the name of the process group whose ranks
    keep it equal: ``""`` for this process alone.
    """

    label: str
    role: Role
    spec: QuantSpec
    edges: tuple[Operand, ...]
    mode: Mode
    state: tuple[fx.Node, ...] = ()
    group: str = ""


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
                label=f"{bound.owner}.{bound.site.name}".lstrip("."),
                role=bound.site.role,
                spec=bound.site.spec,
                edges=bound.edges,
                mode=Mode(bound.mode),
                state=bound.state,
                group=process_group(bound.group),
            )
            by_graph.setdefault(bound.bind.graph, []).append(insertion)
        done = 0
        for module in all_graphs(gm):
            insertions = by_graph.get(module.graph, [])
            if self.stateless:
                insertions = self._stateless(module, result)
            if insertions:
                reader = _Reader(module.graph)
                done += sum(_insert(reader, insertion, self.profile.fuses) for insertion in insertions)
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
            if not isinstance(spec.range, Fixed):
                spec = dataclasses.replace(spec, range=CurrentTensor())
            label = f"{placed.edges[0][0].name}.{placed.edges[0][1]}.{number}"
            insertions.append(Insertion(label=label, role=placed.role, spec=spec, edges=placed.edges, mode=Mode.STATIC))
        return insertions


def process_group(wanted: str | None) -> str:
    """The name of the group whose ranks reduce ranges together, ``""`` for none: None means all ranks."""
    distributed = torch.distributed
    if wanted == "" or not (distributed.is_available() and distributed.is_initialized()):
        return ""
    if wanted is None:
        return str(distributed.group.WORLD.group_name) if distributed.get_world_size() > 1 else ""  # type: ignore[union-attr]
    return wanted


def _erase_binds(graph: fx.Graph) -> int:
    binds = [node for node in graph.nodes if is_bind(node)]
    for node in binds:
        graph.erase_node(node)
    return len(binds)


class _Reader:
    """What inserting needs to know of a graph, read once before it changes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.changed = changed_in_place(graph)
        self.last_input = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)

    def lift(self, edges: Iterable[Operand]) -> Lifting:
        """As `fxquant.place` lifts. Through active dropout too: its input is the tensor that is deployed, its
        output is that tensor's codes at another scale, which would widen the range for nothing."""
        return lift(edges, lambda node: passes_values(node) and node.all_input_nodes[0] not in self.changed)

    def behind(self, source: fx.Node, state: tuple[fx.Node, ...]) -> fx.Node:
        """The node behind which others may read ``source`` and ``state``."""
        if source not in self.order:
            return source  # inserted by another site, behind all inputs
        inputs = (node for node in (self.last_input, *state) if node is not None)
        return max((source, *inputs), key=self.order.__getitem__)


def _insert(reader: _Reader, site: Insertion, fuses: frozenset[str]) -> int:
    """Inserts one site; returns in how many places."""
    if site.mode is Mode.OFF:
        return 0
    lifting = reader.lift(site.edges) if site.role == "activation" else Lifting(set(site.edges))
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
        with reader.graph.inserting_after(reader.behind(source, site.state)):
            quantized = _quantize(reader.graph, source, site)
        if quantized is None:
            continue
        for user in users:
            if site.role == "output" or user in lifting.lifted:
                user.replace_input_with(source, quantized)
        for node, name in site.edges:
            if operands(node).get(name) is source:
                replace_operand(node, name, quantized)
        if site.mode in (Mode.DELAYED, Mode.FIRST):
            _observe_after(reader, source, site, quantized)
    return done


def _observe_after(reader: _Reader, source: fx.Node, site: Insertion, quantized: fx.Node) -> None:
    """Observes a tensor whose update nothing waits for.

    Behind the first reader of the quantized tensor: Inductor takes a reduction into a loop over the same elements
    when the loop comes first, and the loop comes where its reader needs it.
    """
    order = reader.order
    readers = [user for user in quantized.users if user in order and user.op != "output"]
    last = quantized if source in reader.changed else min(readers, key=order.__getitem__, default=quantized)
    with reader.graph.inserting_after(last):
        builder = _Builder(reader.graph, source)
        builder.observe(site, builder.call(aten.detach.default, source))


def _quantize(graph: fx.Graph, source: fx.Node, site: Insertion) -> fx.Node | None:
    """Nodes for one tensor behind the insertion point; None where the site only observes."""
    spec = site.spec
    builder = _Builder(graph, source)
    if spec.group_size is not None:
        return _quantize_groups(builder, site)
    scale, zero_point = builder.qparams(site)
    if scale is None:
        return None
    limits = (spec.quant_min, spec.quant_max)
    if spec.axis is None:
        node = builder.call(fake_quantize.PER_TENSOR, source, scale, zero_point, *limits, rounding=spec.rounding)
    else:
        node = builder.call(
            fake_quantize.PER_CHANNEL, source, scale, zero_point, spec.axis, *limits, rounding=spec.rounding
        )
    node.meta["site"] = site
    return node


def _quantize_groups(builder: _Builder, site: Insertion) -> fx.Node:
    """``w[N, K]``  →  ``reshape(fake_quantize(reshape(w, [N·K/G, G]), s, 0, axis 0), [N, K])``, ``wᵀ`` for ``w[K, N]``.

    A group is a row of what the quantizer sees, so that a scale per row is a scale per group. Of a contiguous
    ``[N, K]`` both reshapes are views.
    """
    spec, source = site.spec, builder.source
    rows = source if spec.axis == 0 else builder.call(aten.transpose.int, source, 0, 1)
    groups = builder.call(aten.reshape.default, rows, [-1, spec.group_size])
    value = builder.call(aten.detach.default, groups)
    both = builder.call(qparams.SYMMETRIC_QPARAMS, value, 0, spec.quant_max)
    scale, zero_point = builder.item(both, 0), builder.item(both, 1)
    limits = (spec.quant_min, spec.quant_max)
    node = builder.call(fake_quantize.PER_CHANNEL, groups, scale, zero_point, 0, *limits, rounding=spec.rounding)
    node.meta["site"] = site
    whole = builder.call(aten.reshape.default, node, list(rows.meta["val"].shape))
    return whole if spec.axis == 0 else builder.call(aten.transpose.int, whole, 0, 1)


def grouped_value(node: fx.Node) -> fx.Node | None:
    """The fake-quant node of a weight per group, given the node behind it that has the weight's own form."""
    while packet(node) in (aten.transpose, aten.reshape):
        node = node.all_input_nodes[0]
    site = node.meta.get("site") if node.target is fake_quantize.PER_CHANNEL else None
    return node if isinstance(site, Insertion) and site.spec.group_size is not None else None


class _Builder:
    """Makes nodes one behind the other, starting at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, source: fx.Node) -> None:
        self.graph, self.source = graph, source
        self.last: fx.Node | None = None

    def call(self, op, *args, **kwargs) -> fx.Node:  # type: ignore[no-untyped-def]
        return self._chain(lambda: call(self.graph, op, *args, like=self.source, **kwargs))

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self._chain(lambda: item(self.graph, node, index))

    def _chain(self, make) -> fx.Node:  # type: ignore[no-untyped-def]
        if self.last is None:
            self.last = make()
        else:
            with self.graph.inserting_after(self.last):
                self.last = make()
        return self.last

    def qparams(self, site: Insertion) -> tuple[fx.Node | None, fx.Node | None]:
        """Scale and zero point nodes, the range updated or resolved first as the mode says."""
        spec = site.spec
        limits = (spec.quant_min, spec.quant_max)
        value = self.call(aten.detach.default, self.source)
        if site.role == "weight" and isinstance(spec.range, CurrentTensor):
            both = self.call(qparams.SYMMETRIC_QPARAMS, value, spec.axis, spec.quant_max)
            return self.item(both, 0), self.item(both, 1)
        low, high = self._range(site, value)
        if site.mode in (Mode.EXTEND, Mode.FOLLOW):
            return None, None
        both = self.call(qparams.AFFINE_QPARAMS, low, high, *limits, spec.symmetric)
        return self.item(both, 0), self.item(both, 1)

    def _range(self, site: Insertion, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        found = site.spec.range
        if isinstance(found, Fixed):
            return self._constant(value, found.min), self._constant(value, found.max)
        if isinstance(found, CurrentTensor):
            unset = self._constant(value, float("nan"))
            both = self.call(qparams.RESOLVE_MIN_MAX, value, unset, unset)
            return self.item(both, 0), self.item(both, 1)
        low, high = site.state
        if site.mode in (Mode.STATIC, Mode.DELAYED):
            return low, high
        if site.mode in (Mode.RESOLVE, Mode.FIRST):
            both = self.call(qparams.RESOLVE_MIN_MAX, value, low, high)
            return self.item(both, 0), self.item(both, 1)
        if site.mode is Mode.TRAIN and site.group:
            return self.observe(site, value)
        if site.mode is Mode.EXTEND:
            both = self.call(qparams.EXTEND_MIN_MAX, value, low, high)
        else:
            both = self.call(qparams.UPDATE_MIN_MAX, value, low, high, found.constant)
        return self._store(site, both)

    def observe(self, site: Insertion, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The update by this tensor in a form that `BatchRangeUpdates` moves to the end of the graph."""
        assert isinstance(site.spec.range, MovingAverage)
        batch = self.call(qparams.BATCH_MIN_MAX, value)
        extremes = self.item(batch, 0), self.item(batch, 1)
        average = self.call(qparams.AVERAGE_MIN_MAX, *extremes, *site.state, site.spec.range.constant)
        mark_observation(average, site.group)
        return self._store(site, average)

    def _store(self, site: Insertion, both: fx.Node) -> tuple[fx.Node, fx.Node]:
        new = self.item(both, 0), self.item(both, 1)
        for state, value in zip(site.state, new, strict=True):
            self.call(aten.copy_.default, state, value)
        return new

    def _constant(self, value: fx.Node, number: float) -> fx.Node:
        # Not new_full of the value: export takes for constant what no input reaches.
        return self.call(aten.full.default, [1], number, dtype=torch.float32, device=value.meta["val"].device)
