"""A recipe's rules asked about the nodes of a graph, and which operators are a model's first and last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxquant.graph.dependence import constant_nodes, weight_computations
from fxquant.graph.kinds import Kind, kind_of, operands
from fxquant.graph.lift import Operand
from fxquant.graph.nodes import call_nodes, is_float
from fxquant.spec.rules import Rule, Rulebook, Where
from fxquant.targets.profiles import Profile


class Exceptions:
    """The rules of a recipe, asked about nodes of one graph.

    ``modules`` gives path and class of the modules around a node, ``ends`` the first and last operator of the model
    that has a weight.
    """

    def __init__(
        self,
        book: Rulebook,
        modules: Callable[[fx.Node], tuple[tuple[str, Any], ...]],
        ends: tuple[fx.Node | None, fx.Node | None],
    ) -> None:
        self.book, self.modules, self.ends = book, modules, ends
        self._decided: dict[Operand, Rule | None] = {}
        self._constants: dict[fx.Graph, set[fx.Node]] = {}

    def rule(self, node: fx.Node, operand: str) -> Rule | None:
        """The rule that decides about an operand."""
        if not self.book.rules:
            return None
        if (node, operand) not in self._decided:
            kind = kind_of(node)
            assert kind is not None
            position = frozenset(name for name, end in zip(("first", "last"), self.ends, strict=True) if end is node)
            where = Where(
                modules=self.modules(node),
                kind=kind.name,
                operand=operand,
                is_weight=self._is_weight(node, kind, operand),
                weighted=any(self._is_weight(node, kind, name) for name in operands(node)),
                position=position,
            )
            self._decided[node, operand] = self.book.decide(where)
        return self._decided[node, operand]

    def _is_weight(self, node: fx.Node, kind: Kind, operand: str) -> bool:
        value = operands(node).get(operand)
        if value is None or not is_float(value) or not (kind.is_weight(operand) or kind.name == "einsum"):
            return False
        if node.graph not in self._constants:
            self._constants[node.graph] = constant_nodes(node.graph)
        return value in self._constants[node.graph]


def weighted(graph: fx.Graph, profile: Profile) -> list[fx.Node]:
    """The operators that a target runs on integers and that have a weight, in order: the first and last layers."""
    constants = constant_nodes(graph)
    computing = weight_computations(graph, constants)
    found = []
    for node in call_nodes(graph):
        kind = kind_of(node)
        if kind is None or kind.name not in profile.hard or node in computing:
            continue
        if any(kind.is_weight(name) and operand in constants for name, operand in operands(node).items()):
            found.append(node)
    return found
