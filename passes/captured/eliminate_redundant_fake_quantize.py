"""A value that already lies on a grid is not put on the same grid again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.dependence import changed_in_place
from fxquant.graph.edit import drop_dead_nodes
from fxquant.graph.meta import add_stand_in, site_of
from fxquant.graph.moves import is_agnostic, unmoved
from fxquant.graph.nodes import call_nodes
from fxquant.graph.views import FakeQuant
from fxquant.ops import qparams
from fxquant.ops.learned import LEARNED_OPS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten

_PURE = (
    *(*qparams.QPARAM_OPS, *LEARNED_OPS, operator.getitem, aten.detach.default, aten.full.default),
    *(aten.reshape.default, aten.transpose.int),  # before a weight per group
)


@dataclass(frozen=True, kw_only=True)
class EliminateRedundantFakeQuantize(Pass):
    """``FQ(move(FQ(x, s, z)), s, z)``  →  ``move(FQ(x, s, z))``, and equal fake-quants of one tensor become one.

    Exact: quantizing ``q·s`` with ``s`` gives q back, and the second mask is all ones on clamped values.
    ``move`` is any chain of ops that only move values. A tensor that is changed in place meanwhile, a range that
    is updated included, makes no equal.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Eliminates in ``gm`` and its nested bodies."""
        return sum(_eliminate(module.graph) for module in all_graphs(gm))


def _eliminate(graph: fx.Graph) -> int:
    seen: dict[tuple[object, ...], fx.Node] = {}
    changed = changed_in_place(graph)
    representative = _equal_qparams(graph, changed)
    done = 0
    for node in list(call_nodes(graph)):
        site = FakeQuant.of(node)
        if site is None or site.input in changed:
            continue
        key = (node.target, representative.get(site.input, site.input), _grid(site, representative))
        twin = seen.setdefault(key, node)
        before = twin if twin is not node else _quantized_before(site, representative, changed)
        if before is not None:
            own = site_of(node)
            if own is not None:
                add_stand_in(before, own.label)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            done += 1
    if done:
        drop_dead_nodes(graph)
    return done


def _grid(site: FakeQuant, representative: dict[fx.Node, fx.Node]) -> tuple[object, ...]:
    """What tells the grids of two fake-quants apart."""
    return (
        *(representative.get(a, a) if isinstance(a, fx.Node) else a for a in site.grid),
        site.rounding,
        site.element,
    )


def _equal_qparams(graph: fx.Graph, changed: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Scale and zero point nodes that are the same function of the same nodes, mapped to the first of them."""
    first: dict[tuple[object, ...], fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in call_nodes(graph):
        if node.target in _PURE and changed.isdisjoint(node.all_input_nodes):
            written = fx.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
            same[node] = first.setdefault((node.target, str(written)), node)
    return same


def _quantized_before(site: FakeQuant, representative: dict[fx.Node, fx.Node], changed: set[fx.Node]) -> fx.Node | None:
    """The operand, if it is an equally quantized value that was only moved since."""
    if site.axis is not None:
        return None  # moving may have moved the channel axis
    earlier = FakeQuant.of(unmoved(site.input, lambda node: is_agnostic(node) and node not in changed))
    if earlier is None or earlier.node.target is not site.node.target or earlier.node in changed:
        return None
    return site.input if _grid(earlier, representative) == _grid(site, representative) else None
