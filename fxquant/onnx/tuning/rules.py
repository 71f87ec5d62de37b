"""From layers of a file to what `fxquant.prepare` is told: rules, by the modules that the layers come from."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fxquant.onnx.site_edges import SiteEdge, Sites
from fxquant.onnx.tuning.graph import QdqGraph
from fxquant.spec.rules import Rule, Where, skip

Operator = tuple[str, str, int]  # the module that runs it, its kind, which of that kind


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """How a model is trained with the chosen layers in float.

    Attributes:
        rules: for `fxquant.prepare`.
        override: sites for `fxquant.override`, where no rule means a layer alone.
        unknown: layers, by name, that the file does not say the module of.
    """

    rules: tuple[Rule, ...] = ()
    override: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class Modules:
    """The operators of the user's model that the layers of a file are."""

    def __init__(self, graph: QdqGraph) -> None:
        self.graph, self.sites = graph, Sites(graph.model)
        self.edges = {key: self._edges(key) for key in graph.layers}
        self._every = {edge for listed in self.sites.edges.values() for edge in listed}

    def path(self, layer: str) -> str | None:
        """The module that runs a layer; None where the file does not say."""
        return next((edge.path for edge in self.edges[layer]), None)

    def _edges(self, layer: str) -> tuple[SiteEdge, ...]:
        """The operands that a layer reads as codes, where all its sites tell of one operator."""
        keys = [key for value in self.graph.layers[layer].input if (key := self._site(value)) is not None]
        listed = [self.sites.edges[key] for key in keys]
        operators = set.intersection(*({edge.operator for edge in edges} for edges in listed)) if listed else set()
        if len(operators) != 1:
            return ()
        return tuple(edge for edges in listed for edge in edges if edge.operator in operators)

    def _site(self, value: str) -> str | None:
        pair = self.graph.pair(value)
        return None if pair is None else self.sites.key(pair.input[0])

    def instructions(self, floats: Iterable[str]) -> Instructions:
        """What leaves these layers in float, and no other."""
        floats = list(floats)
        chosen = {edge for layer in floats for edge in self.edges[layer]}
        kept = {edge for layer in self.edges.keys() - set(floats) for edge in self.edges[layer]}
        operators = {edge.operator for edge in chosen}
        # Operands that no layer reads, as the codes of a result, are of the operator that they name.
        others = {edge for edge in self._every - chosen if edge in kept or edge.operator not in operators}
        rules: dict[Rule, None] = {}
        override: dict[str, None] = {}
        for operator in dict.fromkeys(edge.operator for layer in floats for edge in self.edges[layer]):
            mine = {edge for edge in chosen if edge.operator == operator}
            found = next((r for r in _rules(mine) if not any(_matches(r, e) for e in others)), None)
            if found is not None:
                rules.update(dict.fromkeys(found))
            else:
                override.update(dict.fromkeys(self._keys(mine, chosen)))
        names = tuple(self.graph.layers[key].name or key for key in floats if not self.edges[key])
        return Instructions(rules=tuple(rules), override=tuple(override), unknown=names)

    def _keys(self, mine: set[SiteEdge], chosen: set[SiteEdge]) -> Iterator[str]:
        """Sites of an operator that none but chosen ones read."""
        for key, listed in self.sites.edges.items():
            if mine.intersection(listed) and chosen.issuperset(listed):
                yield key


def _rules(edges: set[SiteEdge]) -> Iterator[tuple[Rule, ...]]:
    """Rules for one operator, from the shortest to the narrowest."""
    first = next(iter(edges))
    path = _escaped(first.path)
    yield (skip(path),)
    yield (skip(path, kind=first.kind),)
    yield tuple(skip(path, kind=first.kind, operand=name) for name in sorted({edge.operand for edge in edges}))


def _matches(rules: tuple[Rule, ...], edge: SiteEdge) -> bool:
    parts = edge.path.split(".") if edge.path else []
    modules = tuple((".".join(parts[:count]), None) for count in range(len(parts) + 1))
    where = Where(modules=modules, kind=edge.kind, operand=edge.operand)
    return any(rule.matches(where) for rule in rules)


def _escaped(path: str) -> str:
    """The path as a glob that means itself."""
    found = re.sub(r"([*?[])", r"[\1]", path)
    assert fnmatch.fnmatchcase(path, found)
    return found


def written(rule: Rule) -> str:
    """``fxquant.skip('stem', kind='conv')``."""
    named = [f"{name}={value!r}" for name in ("kind", "operand") if (value := getattr(rule, name)) is not None]
    return f"fxquant.skip({', '.join([repr(rule.path), *named])})"
