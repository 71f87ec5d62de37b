"""From operands to the tensor they read: walking up through ops that only move values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from fxquant.graph import DROPOUT, is_agnostic, operands, packet

Operand = tuple[fx.Node, str]


def passes_values(node: fx.Node) -> bool:
    """Agnostic, counting every dropout: what holds in the deployed graph, whatever mode was captured."""
    return is_agnostic(node) or (node.op == "call_function" and packet(node) in DROPOUT)


@dataclass
class Lifting:
    """Which agnostic nodes lie between quantized operands and their tensor.

    A node is lifted when every use of it is a quantized operand or another lifted node; a quantizer above it
    then serves exactly what one below would.
    """

    edges: set[Operand]
    lifted: set[fx.Node] = field(default_factory=set)

    def covers(self, node: fx.Node) -> bool:
        """Whether every use of the node is quantized (and there is one)."""
        return bool(node.users) and all(self._covers_use(node, user) for user in node.users)

    def _covers_use(self, node: fx.Node, user: fx.Node) -> bool:
        if user in self.lifted:
            return True
        reading = [name for name, operand in operands(user).items() if operand is node]
        others = user.all_input_nodes.count(node) and _count_uses(user, node) - len(reading)
        return bool(reading) and not others and all((user, name) in self.edges for name in reading)

    def drop(self, consumer: fx.Node) -> None:
        """Takes back the demands of one operator, and every lift that rested on them."""
        for name, node in operands(consumer).items():
            self.edges.discard((consumer, name))
            while node in self.lifted:
                self.lifted.remove(node)
                node = node.all_input_nodes[0]

    def source(self, operand: Operand) -> fx.Node:
        """The tensor behind an operand."""
        consumer, name = operand
        node = operands(consumer)[name]
        while node in self.lifted:
            node = node.all_input_nodes[0]
        return node


def _count_uses(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count


def lift(edges: Iterable[Operand], passable: Callable[[fx.Node], bool] = is_agnostic) -> Lifting:
    """Lifts the edges as far up as `Lifting` allows; looks only at what lies above them."""
    lifting = Lifting(set(edges))
    waiting = [operands(consumer)[name] for consumer, name in lifting.edges]
    while waiting:
        node = waiting.pop()
        if node not in lifting.lifted and passable(node) and lifting.covers(node):
            lifting.lifted.add(node)
            waiting.append(node.all_input_nodes[0])
    return lifting
