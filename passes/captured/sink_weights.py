"""Weights are fake-quantized where they are first read."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.moves import AGNOSTIC
from fxquant.graph.nodes import call_nodes, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.constant_weights import WITHOUT_AUTOCAST, is_weight, written_inputs
from fxquant.passes.stages import CAPTURED


@dataclass(frozen=True, kw_only=True)
class SinkWeights(Pass):
    """``w' = FQ(w); …; y = op(x, w')``  →  ``…; w' = FQ(w); y = op(x, w')``.

    The fake-quant of a weight stands after its parameter, that is where the graph begins, and compiled code keeps such
    an order: it wrote all weights of a model before the first layer, and held each until its own. Sunk, no two of them
    share a kernel, and equal layers have equal kernels, which are compiled once.

    What a scale is computed from moves too, if nothing else reads it. A weight that depends on more than parameters and
    buffers which the graph leaves alone stays where it is.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Sinks in ``gm`` and its nested bodies."""
        return sum(map(_sink, all_graphs(gm)))


def _sink(gm: fx.GraphModule) -> int:
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    written = written_inputs(gm)
    chains = {weight: _chain(weight, order, written) for weight in call_nodes(gm.graph) if is_weight(weight)}
    sinking = {node for chain in chains.values() for node in chain}
    done = 0
    for weight, chain in chains.items():
        first = min(weight.users, key=order.__getitem__, default=None)
        if chain and first is not None and not _stands_before(weight, first, sinking):
            for node in chain:
                first.prepend(node)
            done += 1
    return done


def _chain(weight: fx.Node, order: dict[fx.Node, int], written: set[fx.Node]) -> list[fx.Node]:
    """The nodes that serve a weight alone, in order; none where one of those that make it must not move."""
    made_by, stack = {weight}, [weight]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node.op != "call_function" and (node.op != "placeholder" or node in written):
                return []
            if node.op == "call_function" and node not in made_by:
                made_by.add(node)
                stack.append(node)
    if not all(_is_movable(node) for node in made_by):
        return []
    alone = {weight}
    for node in sorted(made_by - {weight}, key=order.__getitem__, reverse=True):
        if all(user in alone for user in node.users):
            alone.add(node)
    return sorted(alone, key=order.__getitem__)


def _is_movable(node: fx.Node) -> bool:
    """Whether a node gives the same anywhere, where autocast is switched too."""
    return node.target in (*WITHOUT_AUTOCAST, operator.getitem) or packet(node) in AGNOSTIC


def _stands_before(weight: fx.Node, first: fx.Node, sinking: set[fx.Node]) -> bool:
    node = weight.next
    while node in sinking:
        node = node.next
    return node is first
