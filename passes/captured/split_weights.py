"""What is a function of parameters and buffers alone, as graphs of its own: fake-quantized weights, their scales."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from fxquant.graph.bodies import all_graphs, is_checkpoint, nested_graphs
from fxquant.graph.edit import call, drop_dead_nodes
from fxquant.graph.nodes import call_nodes
from fxquant.graph.static_inputs import is_of_dynamo, keep_sources, stand_for, without_source
from fxquant.ops import qparams
from fxquant.ops.marks import STAND_IN
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.constant_weights import Reasons, is_weight, reasons, reasons_inside
from fxquant.passes.stages import CAPTURED

_QPARAMS = (qparams.SYMMETRIC_QPARAMS, qparams.AFFINE_QPARAMS)


@dataclass(frozen=True)
class Part:
    """Weights that change together: ``gm`` computes their values from the inputs at ``positions``.

    Attributes:
        gm: no mutation, nothing random, no gradient wanted; placeholders and nodes are named by their order alone.
        positions: the inputs of the whole graph that it reads.
        weights: how many fake-quantized weights are among its results; the others are scales and zero points.
        fakes: the fake values of its results.
    """

    gm: fx.GraphModule
    positions: tuple[int, ...]
    weights: int
    fakes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Parts:
    """The parts that `SplitWeights` took out: a product of its `PassResult`."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class SplitWeights(Pass):
    """``conv(x, FQ(w))``  →  ``conv(x, stand_in(w, k))`` with a new input ``k``, and the part ``FQ(w)`` that makes it.

    For weights whose gradient passes through their fake-quant; elsewhere ``stand_in(FQ(w, s, z), k)``. The values of
    ``s`` and ``z`` are inputs, too, where they are read besides. As the graph goes on computing the gradient, it stays
    what it was, sums of several included. New inputs stand after the others, part by part. There are two parts at
    most: weights that have a gradient, which an optimizer changes, and those that have none. The `PassResult` holds
    them as `Parts`.

    Declined: weights that depend on anything but parameters and buffers.

    ``inputs``: the values of the graph's inputs. Which weights have a gradient, and what shares memory, is read there.
    """

    stages: ClassVar = (CAPTURED,)

    inputs: tuple[Any, ...] = field(repr=False, compare=False)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Splits the graph, weights of its checkpointed bodies included."""
        around = reasons(gm, self.inputs)
        found = self._constant(gm.graph, around, result)
        for node in list(call_nodes(gm.graph)):
            for body in nested_graphs(gm, node):
                found += self._lift(node, body, around, result)
        result.products.append(Parts(_parts(gm, found, self.inputs)))
        if found:
            drop_dead_nodes(gm.graph)
        return len(found)

    def _constant(self, graph: fx.Graph, known: Reasons, result: PassResult) -> list[fx.Node]:
        """The weights of a graph that can be computed once for many calls."""
        found = []
        for node in call_nodes(graph):
            if is_weight(node) and not _is_split(node):
                reason = known[node]
                if reason is None:
                    found.append(node)
                else:
                    self.decline(result, node, reason)
        return found

    def _lift(self, outer: fx.Node, body: fx.GraphModule, around: Reasons, result: PassResult) -> list[fx.Node]:
        """The weights of a checkpointed region become operands of it; returns what they are outside.

        ``checkpoint(body, x, w)`` with ``body: conv(x, FQ(w))``  →  ``checkpoint(body, x, w, FQ(w))`` with
        ``body: conv(x, stand_in(w, k))``. Weights in bodies of other operators, and in regions of regions, stay there.
        """
        region = is_checkpoint(outer)
        for each in all_graphs(body):
            for node in filter(is_weight, call_nodes(each.graph) if each is not body or not region else ()):
                self.decline(result, node, f"it is computed in a body of {outer.name}: it is quantized in every call")
        weights = self._constant(body.graph, reasons_inside(outer, body, around), result) if region else []
        return _lifted(outer, body, weights) if weights else []


def _is_split(weight: fx.Node) -> bool:
    """Whether only a stand-in reads it, for its gradient."""
    return bool(weight.users) and all(user.target is STAND_IN for user in weight.users)


def _lifted(outer: fx.Node, body: fx.GraphModule, weights: Sequence[fx.Node]) -> list[fx.Node]:
    """Computes weights of a body outside, and hands them in."""
    gone, read = _gone(weights), _read_besides(weights, _gone(weights))
    cone = _cone([*weights, *read])
    names: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), outer.args[1:], strict=True))
    with outer.graph.inserting_before(outer):
        for node in body.graph.nodes:
            if node in cone and node.op == "call_function":
                names[node] = outer.graph.node_copy(node, names.__getitem__)
    for node in (*weights, *read):
        _replace(node, _placeholder(body.graph, node.meta["val"].detach()), node in gone)
    outer.args = (*outer.args, *(names[node] for node in (*weights, *read)))
    drop_dead_nodes(body.graph)
    return [names[weight] for weight in weights]


def _gone(weights: Sequence[fx.Node]) -> set[fx.Node]:
    """Those of which not even the gradient reads anything."""
    return {weight for weight in weights if weight.kwargs.get("pass_through")}


def _read_besides(weights: Sequence[fx.Node], gone: set[fx.Node]) -> list[fx.Node]:
    """The computed scales and zero points of weights that something reads but weights that are gone."""
    return list(dict.fromkeys(q for weight in weights for q in _qparams(weight) if not gone.issuperset(q.users)))


def _cone(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """All that the nodes are computed from, themselves included."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _parts(gm: fx.GraphModule, weights: Sequence[fx.Node], inputs: Sequence[Any]) -> tuple[Part, ...]:
    """Makes the parts, and puts their results, as inputs, in the place of what they are."""
    gone = _gone(weights)
    positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    groups: dict[bool, list[fx.Node]] = {}
    for weight in weights:
        trained = any(inputs[positions[n]].requires_grad for n in _cone([weight]) if n.op == "placeholder")
        groups.setdefault(trained, []).append(weight)
    parts, results = [], []
    for trained in sorted(groups):
        own = groups[trained]
        read = _read_besides(own, gone)
        parts.append(_part(gm, [*own, *read], positions, len(own)))
        results.append([*own, *read])
    for part, nodes in zip(parts, results, strict=True):
        for node, fake in zip(nodes, part.fakes, strict=True):
            _replace(node, _placeholder(gm.graph, fake), node in gone)
    return tuple(parts)


def _replace(node: fx.Node, known: fx.Node, is_gone: bool) -> None:
    if node.target is operator.getitem:  # a scale or zero point, which has no gradient
        node.replace_all_uses_with(known)
        return
    with node.graph.inserting_after(node):
        stand = call(node.graph, STAND_IN, node.args[0] if is_gone else node, known, like=node)
    node.replace_all_uses_with(stand, delete_user_cb=lambda user: user is not stand)


def _qparams(weight: fx.Node) -> list[fx.Node]:
    """The scale and zero point of a weight, where they are computed: never with a gradient."""
    items = [a for a in weight.args[1:3] if isinstance(a, fx.Node) and a.target is operator.getitem]
    return [item for item in items if item.all_input_nodes[0].target in _QPARAMS]


def _part(gm: fx.GraphModule, results: Sequence[fx.Node], positions: dict[fx.Node, int], weights: int) -> Part:
    cone = _cone(results)
    sources = sorted((node for node in cone if node.op == "placeholder"), key=positions.__getitem__)
    graph = fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    for index, source in enumerate(sources):
        names[source] = graph.placeholder(f"p{index}")
    for node in gm.graph.nodes:
        if node in cone and node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), names.__getitem__)
            names[node] = graph.call_function(node.target, args, kwargs)
    for old, new in names.items():
        new.meta = dict(old.meta)
    for source in sources:
        keep_sources(names[source], source)
    graph.output(tuple(names[node] for node in results))
    part = fx.GraphModule({}, graph)
    if is_of_dynamo(gm):
        stand_for(part, gm, {})
    fakes = tuple(node.meta["val"].detach() for node in results)
    return Part(part, tuple(positions[node] for node in sources), weights, fakes)


def _placeholder(graph: fx.Graph, fake: Tensor) -> fx.Node:
    """A new last input."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder("known")
    node.target = node.name  # the graph's own code has it as a parameter
    node.meta.update(val=fake, source="", state=False)
    without_source(node)
    return node
