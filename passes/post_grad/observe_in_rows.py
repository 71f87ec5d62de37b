"""The extremes of a tensor are taken row by row, in the loop that computes its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument
from fxquant.graph.edit import call
from fxquant.graph.elementwise import elements, is_pointwise
from fxquant.graph.moves import ALL_ONCE, is_moving
from fxquant.graph.nodes import call_nodes, packet
from fxquant.ops.marks import MATERIALIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import POST_GRAD

aten = torch.ops.aten
_EXTREMES = (aten.amin, aten.amax)
_STATISTICS = (aten.var_mean, aten.mean, aten.sum, aten.amax)

_COLUMNS = 64  # of fewer, a loop a row is no gain


@dataclass(frozen=True, kw_only=True)
class ObserveInRows(Pass):
    """Post-grad graph, on CPU, for LayerNorm's result ``y``: ``amin(view(y))``  →  ``amin(amin(y, [-1]), [0, 1])``.

    Exact: the least of the least is the least, in any order and shape. Inductor's C++ puts loops over the same rows
    into one, but one over all elements into none: it read a LayerNorm's or BatchNorm's input once for mean and
    variance, and from the first element on once more for the range of the result. In one loop over the rows, or over
    BatchNorm's channels, the second reading finds in the cache what the first has brought there.

    The rows are those of a mean, sum or maximum that ``y`` is computed from. For a stored value it is the last
    dimension where a vector along it takes part, as a bias does: its loop has two levels then, too. Of the bytes that a
    step moves it is 4 % in a CNN with BatchNorm, 1 % in a transformer, 3 % in a mixer.
    """

    stages: ClassVar = (POST_GRAD,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites the graph itself."""
        return sum(_split(gm.graph, node) for node in list(call_nodes(gm.graph)) if _is_of_everything(node))


def _is_of_everything(node: fx.Node) -> bool:
    """Whether a node is one extreme of a whole tensor of several dimensions, on CPU."""
    if packet(node) not in _EXTREMES:
        return False
    source = node.all_input_nodes[0].meta["val"]
    return source.device.type == "cpu" and source.dim() > 1 and node.meta["val"].dim() == 0


def _split(graph: fx.Graph, node: fx.Node) -> int:
    source = node.all_input_nodes[0]
    while packet(source) in ALL_ONCE:
        source = source.all_input_nodes[0]
    if any(user.target is MATERIALIZE for user in source.users):
        return 0  # its loop is the one that stores it
    dims = _of_stored(source) if source.target is MATERIALIZE else _of_statistics(source)
    if dims is None:
        return 0
    with graph.inserting_before(node):
        rows = call(graph, node.target, source, dims, like=node)
        least = call(graph, node.target, rows, list(range(rows.meta["val"].dim())), like=node)
    node.replace_all_uses_with(least)
    graph.erase_node(node)
    return 1


def _of_statistics(source: fx.Node) -> list[int] | None:
    """The dimensions that a statistic of as large a tensor, which ``source`` is computed from, is taken over."""
    rank = source.meta["val"].dim()
    for node in _computed_with(source):
        if packet(node) not in _STATISTICS or not has_argument(node, "dim"):
            continue
        taken, dims = node.all_input_nodes[0], argument(node, "dim")
        value = taken.meta["val"]
        if isinstance(dims, (list, tuple)) and value.dim() == rank and elements(taken) == elements(source):
            found = sorted({int(d) % rank for d in dims})
            if 0 < len(found) < rank:
                return found
    return None


def _of_stored(source: fx.Node) -> list[int] | None:
    """The last dimension, where a vector along it takes part in what is stored."""
    shape = source.meta["val"].shape
    columns = shape[-1]
    if not isinstance(columns, int) or columns < _COLUMNS:
        return None
    values = (node.meta.get("val") for node in _computed_with(source.all_input_nodes[0]))
    vector = any(isinstance(v, torch.Tensor) and v.dim() == 1 and _is_size(v.shape[0], columns) for v in values)
    return [len(shape) - 1] if vector else None


def _is_size(size: int | torch.SymInt, number: int) -> bool:
    return isinstance(size, int) and size == number


def _computed_with(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it is computed from element by element, up to values that other operators give."""
    stack, seen = [node], {node}
    while stack:
        each = stack.pop()
        yield each
        if is_pointwise(each) or is_moving(each):
            for source in each.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
