"""A value that already lies on a grid is not put on the same grid again."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.dependence import changed_in_place
from fxquant.graph.edit import drop_dead_nodes
from fxquant.graph.moves import is_agnostic
from fxquant.graph.nodes import call_nodes
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.base import Pass, PassResult

aten = torch.ops.aten

_PURE = (
    *(*qparams.QPARAM_OPS, operator.getitem, aten.detach.default, aten.full.default),
    *(aten.reshape.default, aten.transpose.int),  # before a weight per group
)


@dataclass(frozen=True, kw_only=True)
class EliminateRedundantFakeQuantize(Pass):
    """``FQ(move(FQ(x, s, z)), s, z)``  →  ``move(FQ(x, s, z))``, and equal fake-quants of one tensor become one.

    Exact: quantizing ``q·s`` with ``s`` gives q back, and the second mask is all ones on clamped values.
    ``move`` is any chain of ops that only move values. A tensor that is changed in place meanwhile, a range that
    is updated included, makes no equal.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Eliminates in ``gm`` and its nested bodies."""
        return sum(_eliminate(module.graph) for module in all_graphs(gm))


def _eliminate(graph: fx.Graph) -> int:
    seen: dict[tuple[object, ...], fx.Node] = {}
    changed = changed_in_place(graph)
    representative = _equal_qparams(graph, changed)
    done = 0
    for node in list(call_nodes(graph)):
        if node.target not in fake_quantize.FAKE_QUANTIZE or node.args[0] in changed:
            continue
        parameters = tuple(representative.get(a, a) if isinstance(a, fx.Node) else a for a in node.args[1:])
        value = node.all_input_nodes[0]
        key = (node.target, representative.get(value, value), parameters, node.kwargs.get("rounding"))
        twin = seen.setdefault(key, node)
        before = twin if twin is not node else _quantized_before(node, parameters, representative, changed)
        if before is not None:
            if "site" in node.meta:
                before.meta.setdefault("stands_for", []).append(node.meta["site"].label)
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            done += 1
    if done:
        drop_dead_nodes(graph)
    return done


def _equal_qparams(graph: fx.Graph, changed: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Scale and zero point nodes that are the same function of the same nodes, mapped to the first of them."""
    first: dict[tuple[object, ...], fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in call_nodes(graph):
        if node.target in _PURE and not any(isinstance(a, fx.Node) and a in changed for a in node.args):
            args = tuple(same.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
            same[node] = first.setdefault((node.target, str(args), str(node.kwargs)), node)
    return same


def _quantized_before(
    node: fx.Node, parameters: tuple[object, ...], representative: dict[fx.Node, fx.Node], changed: set[fx.Node]
) -> fx.Node | None:
    """The operand, if it is an equally quantized value that was only moved since."""
    if node.target is fake_quantize.PER_CHANNEL:
        return None  # moving may have moved the channel axis
    operand = node.args[0]
    origin = operand
    while isinstance(origin, fx.Node) and is_agnostic(origin) and origin not in changed:
        origin = origin.args[0]
    if not isinstance(origin, fx.Node) or origin.target is not node.target or origin in changed:
        return None
    earlier = tuple(representative.get(a, a) if isinstance(a, fx.Node) else a for a in origin.args[1:])
    same = earlier == parameters and origin.kwargs.get("rounding") == node.kwargs.get("rounding")
    return operand if same else None  # type: ignore[return-value]
