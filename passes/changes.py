"""Whether a graph changed: its nodes and what they hold, before and after, compared by identity."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxquant.graph.bodies import all_graphs


class Snapshot:
    """What a graph and its bodies are made of at one moment: order, operators, operands, and some keys of meta.

    Nothing is printed or hashed. fx makes a new tuple of operands at every edit, so what is the same object is
    unchanged; only what is another object is looked into. Values put into a list or a dict of meta in place are not
    seen.
    """

    def __init__(self, gm: fx.GraphModule, keys: Sequence[str]) -> None:
        self.graphs = tuple(all_graphs(gm))
        self.nodes: list[fx.Node] = [node for module in self.graphs for node in module.graph.nodes]
        self._keys = tuple(keys)
        self._held: list[Any] = []
        for node in self.nodes:
            self._held += (node, node.target, node.args, node.kwargs, *map(node.meta.get, keys))

    def difference(self, later: Snapshot) -> str | None:
        """Where a later snapshot of the same graph is another one; None where nothing changed."""
        old, new = self._held, later._held
        if len(old) == len(new) and all(map(operator.is_, old, new)):
            return None
        width = 4 + len(self._keys)
        names = ("place", "operator", "operands", "keyword operands", *(f"meta[{key!r}]" for key in self._keys))
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            if not _same(before, after):
                return f"the {names[index % width]} of {self.nodes[index // width].name}"
        return None if len(old) == len(new) else f"{len(self.nodes)} nodes before, {len(later.nodes)} after"


def _same(before: Any, after: Any) -> bool:
    """Equal without a look at the values of tensors or symbols."""
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)
    return isinstance(before, (bool, int, float, complex, str)) and repr(before) == repr(after)
