"""From operands to the tensor they read: walking up through ops that only move values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from fxquant.graph.kinds import operands
from fxquant.graph.moves import is_agnostic

Operand = tuple[fx.Node, str]


@dataclass
class Lifting:
    """Which agnostic nodes lie between quantized operands and their tensor.

    A node is lifted when every use of it is a quantized operand or another lifted node; a quantizer above it
    then serves exactly what one below would. Every use is looked at once, and counted from then on: a tensor with many
    readers, and a reader with many operands, cost no more than their edges. The graph must not change meanwhile.
    """

    edges: set[Operand]
    lifted: set[fx.Node] = field(default_factory=set)
    _open: dict[fx.Node, int] = field(default_factory=dict, repr=False, compare=False)  # users not covered, by node
    _reads: dict[fx.Node, dict[str, fx.Node]] = field(default_factory=dict, repr=False, compare=False)
    _names: dict[fx.Node, dict[fx.Node, list[str]]] = field(default_factory=dict, repr=False, compare=False)

    def covers(self, node: fx.Node) -> bool:
        """Whether every use of the node is quantized (and there is one)."""
        if node not in self._open:
            self._open[node] = sum(not self._covers_use(node, user) for user in node.users)
        return bool(node.users) and not self._open[node]

    def _covers_use(self, node: fx.Node, user: fx.Node) -> bool:
        if user in self.lifted:
            return True
        names = self._reading(user).get(node)
        return names is not None and all((user, name) in self.edges for name in names)

    def _reading(self, user: fx.Node) -> dict[fx.Node, list[str]]:
        """Node → the operands of ``user`` that it is, for the nodes that have no other use there."""
        if user not in self._names:
            found: dict[fx.Node, list[str]] = {}
            for name, operand in self._operands(user).items():
                found.setdefault(operand, []).append(name)
            counts = _count_uses(user) if found else {}
            self._names[user] = {node: names for node, names in found.items() if counts[node] == len(names)}
        return self._names[user]

    def _operands(self, user: fx.Node) -> dict[str, fx.Node]:
        if user not in self._reads:
            self._reads[user] = operands(user)
        return self._reads[user]

    def lift(self, node: fx.Node) -> None:
        """Marks a covered node: what it reads is quantized for it."""
        before = [(tensor, self._covers_use(tensor, node)) for tensor in node.all_input_nodes if tensor in self._open]
        self.lifted.add(node)
        self._recount(node, before)

    def drop(self, consumer: fx.Node) -> None:
        """Takes back the demands of one operator, and every lift that rested on them."""
        read = self._operands(consumer)
        before = [(node, self._covers_use(node, consumer)) for node in dict.fromkeys(read.values())]
        self.edges.difference_update([(consumer, name) for name in read])
        self._recount(consumer, before)
        for node in read.values():
            while node in self.lifted:
                above = node.all_input_nodes
                before = [(tensor, True) for tensor in above]
                self.lifted.remove(node)
                self._recount(node, before)
                node = above[0]

    def _recount(self, user: fx.Node, before: list[tuple[fx.Node, bool]]) -> None:
        for tensor, covered in before:
            if tensor in self._open:
                self._open[tensor] += covered - self._covers_use(tensor, user)

    def source(self, operand: Operand) -> fx.Node:
        """The tensor that an operand is, moved at most."""
        consumer, name = operand
        node = self._operands(consumer)[name]
        while node in self.lifted:
            node = node.all_input_nodes[0]
        return node


def _count_uses(user: fx.Node) -> dict[fx.Node, int]:
    """How often each node stands in the arguments of ``user``."""
    counts: dict[fx.Node, int] = {}

    def visit(argument: fx.Node) -> fx.Node:
        counts[argument] = counts.get(argument, 0) + 1
        return argument

    fx.node.map_arg((user.args, user.kwargs), visit)
    return counts


def lift(edges: Iterable[Operand], passable: Callable[[fx.Node], bool] = is_agnostic) -> Lifting:
    """Lifts the edges as far up as `Lifting` allows; looks only at what lies above them."""
    lifting = Lifting(set(edges))
    waiting = [lifting.source(edge) for edge in lifting.edges]
    while waiting:
        node = waiting.pop()
        if node not in lifting.lifted and passable(node) and lifting.covers(node):
            lifting.lift(node)
            waiting.append(node.all_input_nodes[0])
    return lifting
