"""What is computed from parameters alone is computed where it is first needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxquant.graph import ever_changed
from fxquant.passes.base import Pass, PassResult, all_graphs, mutates


@dataclass(frozen=True, kw_only=True)
class SinkParameters(Pass):
    """``fq(w₁), fq(w₂), …, linear₁, …, linear₂``  →  ``…, fq(w₁), linear₁, …, fq(w₂), linear₂``.

    Inserted behind the inputs, every quantized weight would live from the start of forward to its layer. Nodes that read
    what the graph changes, as running statistics, stay where they are.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Moves nodes of ``gm`` and its nested bodies."""
        return sum(_sink(module.graph) for module in all_graphs(gm))


def _sink(graph: fx.Graph) -> int:
    order = {node: index for index, node in enumerate(graph.nodes)}
    movable = _of_parameters(graph)
    anchor: dict[fx.Node, fx.Node] = {}  # moved node → the unmoved one that it stands before
    first: dict[fx.Node, fx.Node] = {}  # unmoved node → the first of those that stand before it
    done = 0
    for node in reversed(movable):
        behind = min((anchor.get(user, user) for user in node.users), key=order.__getitem__)
        place = first.get(behind, behind)
        done += node.next is not place
        place.prepend(node)
        anchor[node], first[behind] = behind, node
    return done


def _of_parameters(graph: fx.Graph) -> list[fx.Node]:
    changed = ever_changed(graph)
    constant = {node for node in graph.nodes if node.op in ("placeholder", "get_attr") and node not in changed}
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or not node.users or node.is_impure() or mutates(node) or node in changed:
            continue
        sources = node.all_input_nodes
        if sources and all(source in constant for source in sources):
            constant.add(node)
            found.append(node)
    return found
