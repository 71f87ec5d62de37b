"""Operands and result of a concat share one scale where the target asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call, drop_dead_nodes, item
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.nodes import call_nodes
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.base import Pass, PassResult
from fxquant.targets.profiles import Profile

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UnifyScales(Pass):
    """``FQ(cat(FQ(a, sa), FQ(b, sb)), sc)``  →  ``FQ(cat(FQ(a, s), FQ(b, s)), s)`` with the widest of the ranges.

    ``s`` comes from the least minimum and the greatest maximum of the members. Only for profiles with
    ``joins_scale``; a concat is declined when a member's range depends on another member's quantized value
    (dense connections), since the shared scale would then need itself.
    """

    profile: Profile

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Unifies in ``gm`` and its nested bodies."""
        if not self.profile.joins_scale:
            return 0
        return sum(self._unify_all(module.graph, result) for module in all_graphs(gm))

    def _unify_all(self, graph: fx.Graph, result: PassResult) -> int:
        done = 0
        for node in list(call_nodes(graph)):
            kind = kind_of(node)
            if kind is not None and kind.name == "cat":
                done += self._unify(graph, node, result)
        return done

    def _unify(self, graph: fx.Graph, concat: fx.Node, result: PassResult) -> int:
        inner = list(dict.fromkeys(operands(concat).values()))
        outer = [user for user in concat.users if user.target is fake_quantize.PER_TENSOR]
        pairs = {member: _qparams(member) for member in (*inner, *outer)}
        if None in pairs.values():
            self.decline(result, concat, "not every operand has a scale of its own to share")
            return 0
        made_by = list(dict.fromkeys(pair for pair in pairs.values() if pair is not None))
        if len(made_by) < 2:
            return 0
        if any(pair.args[2:] != made_by[0].args[2:] for pair in made_by):
            self.decline(result, concat, "its operands have different formats")
            return 0
        ranges = [pair for pair in made_by if pair in {pairs[member] for member in inner}]
        order = {node: i for i, node in enumerate(graph.nodes)}
        last = max(ranges, key=order.__getitem__)
        if any(order[user] < order[last] for member in inner for user in member.users):
            self.decline(result, concat, "an operand is used quantized before the others' ranges are known")
            return 0
        scale, zero_point = _widest(graph, ranges, last)
        for member in pairs:
            member.update_arg(1, scale)
            member.update_arg(2, zero_point)
        for member in inner:
            zero_point.append(member)  # behind the scale that it now reads
        drop_dead_nodes(graph)
        return 1


def _qparams(member: fx.Node) -> fx.Node | None:
    """The op that makes the scale of a fake-quant node from a range, if that is what ``member`` is."""
    scale = member.args[1] if member.target is fake_quantize.PER_TENSOR else None
    pair = scale.args[0] if isinstance(scale, fx.Node) and scale.args else None
    return pair if isinstance(pair, fx.Node) and pair.target is qparams.AFFINE_QPARAMS else None


def _widest(graph: fx.Graph, pairs: list[fx.Node], last: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Scale and zero point of the union of the ranges, behind the last of them."""
    (low, high), *others = ((pair.args[0], pair.args[1]) for pair in pairs)
    end = last.next
    with graph.inserting_before(end):
        for other_low, other_high in others:
            low = call(graph, aten.minimum.default, low, other_low, like=last)
            high = call(graph, aten.maximum.default, high, other_high, like=last)
        both = call(graph, qparams.AFFINE_QPARAMS, low, high, *last.args[2:], like=last)
        return item(graph, both, 0), item(graph, both, 1)
