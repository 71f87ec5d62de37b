"""The ranges that a graph observed are updated at its end, and over all ranks at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import set_argument
from fxquant.graph.bodies import body_operands, is_checkpoint, nested_graphs
from fxquant.graph.edit import call, item
from fxquant.graph.meta import is_observation, take_observation
from fxquant.graph.nodes import results
from fxquant.graph.views import AverageMinMax, items
from fxquant.ops import qparams
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.across_ranks import reduced
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten


@dataclass(frozen=True)
class _Observation:
    """Extremes of one tensor, and the state that they go into."""

    low: fx.Node
    high: fx.Node
    state: tuple[fx.Node, fx.Node]
    constant: float
    group: str


@dataclass(frozen=True, kw_only=True)
class BatchRangeUpdates(Pass):
    """``new = average_min_max(low, high, min, max, c); min ← new[0]; max ← new[1]`` moves to the end of its graph.

    Whatever else reads a range in the graph so reads the one at entry, and waits for no extreme. The update is a few
    operations on single elements, which a compiler does where the reduction to ``low`` and ``high`` ends. Extremes
    that checkpointed bodies observed become results of theirs, and count with the graph around them. A range whose
    tensor is observed twice in a graph moves twice.

    Observations with a process group are first reduced over it, in one ``all_reduce`` a graph (`across_ranks`). All
    ranks leave a range alone for which one of them met a non-finite value.
    A range that is updated *before* it is used has then been quantized with this rank's own average, from which a
    second use in the graph goes on; what is kept is the average with the reduced extremes.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites ``gm``, with what its checkpointed bodies observed, and other nested bodies for themselves."""
        found = _collect(gm)
        _update(gm.graph, found)
        return len(found)


def _collect(gm: fx.GraphModule) -> list[_Observation]:
    """Takes the updates out of a graph, in order; those of bodies that cannot hand them out end these bodies."""
    found: list[_Observation] = []
    latest: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        average = AverageMinMax.of(node)
        if average is not None and is_observation(node):
            found.append(_take(average, latest))
        for body in nested_graphs(gm, node):
            inner = _collect(body)
            if inner and is_checkpoint(node) and isinstance(node.meta["val"], (tuple, list)):
                found += _hand_out(node, body, inner)
            else:
                _update(body.graph, inner)
    return found


def _take(average: AverageMinMax, latest: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> _Observation:
    """Takes one update out; its average stays where something is quantized with it, and goes on from the latest."""
    node, state = average.node, average.state
    found = _Observation(*average.extremes, state, average.constant, take_observation(node))
    new_min, new_max = items(node)
    for user in [user for got in (new_min, new_max) for user in got.users if user.target is aten.copy_.default]:
        user.graph.erase_node(user)
    if new_min.users or new_max.users:
        for name, value in zip(("min", "max"), latest.get(state[0], state), strict=True):
            set_argument(node, name, value)
        latest[state[0]] = new_min, new_max
    else:
        for unused in (new_min, new_max, node):
            unused.graph.erase_node(unused)
    return found


def _hand_out(node: fx.Node, body: fx.GraphModule, inner: Sequence[_Observation]) -> list[_Observation]:
    """Extremes of a checkpointed body as results of the node that runs it."""
    extremes = [extreme for one in inner for extreme in (one.low, one.high)]
    given = results(body.graph)
    body.graph.output_node().args = ((*given, *extremes),)
    node.meta["val"] = (*node.meta["val"], *(extreme.meta["val"] for extreme in extremes))
    outside = body_operands(node, body)
    found, after = [], node.next
    for number, one in enumerate(inner):
        first = len(given) + 2 * number
        with node.graph.inserting_before(after):
            low, high = item(node.graph, node, first), item(node.graph, node, first + 1)
        minimum, maximum = (outside[state] for state in one.state)
        assert isinstance(minimum, fx.Node) and isinstance(maximum, fx.Node), "state comes in as inputs"
        found.append(_Observation(low, high, (minimum, maximum), one.constant, one.group))
    return found


def _update(graph: fx.Graph, found: Sequence[_Observation]) -> None:
    """Puts the updates in front of the graph's output, those of one group and device behind one reduction."""
    together: dict[tuple[str, object], list[_Observation]] = {}
    for one in found:
        together.setdefault((one.group, one.low.meta["val"].device), []).append(one)
    with graph.inserting_before(graph.output_node()):
        for (group, _), members in together.items():
            latest: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] = {}
            for one in _reduced(graph, members, group) if group else members:
                old = latest.get(one.state, one.state)
                new = call(graph, qparams.AVERAGE_MIN_MAX, one.low, one.high, *old, one.constant, like=one.low)
                latest[one.state] = item(graph, new, 0), item(graph, new, 1)
            for state, values in latest.items():
                for tensor, value in zip(state, values, strict=True):
                    call(graph, aten.copy_.default, tensor, value, like=value)


def _reduced(graph: fx.Graph, members: Sequence[_Observation], group: str) -> list[_Observation]:
    """The same with minimum and maximum over all ranks."""
    make = functools.partial(call, graph, like=members[-1].low)
    lows, highs = reduced(make, [one.low for one in members], [one.high for one in members], group)
    extremes = zip(lows, highs, members, strict=True)
    return [_Observation(low, high, one.state, one.constant, one.group) for low, high, one in extremes]
