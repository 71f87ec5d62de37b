"""Operands and result of a concat share one scale where the target asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph import call_nodes, kind_of, operands
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.base import Pass, PassResult, call, drop_dead_nodes, item
from fxquant.passes.insert_fake_quantize import all_graphs
from fxquant.profiles import Profile

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
        members = [*operands(concat).values(), *(u for u in concat.users if u.target is fake_quantize.PER_TENSOR)]
        if any(m.target is not fake_quantize.PER_TENSOR for m in members):
            self.decline(result, concat, "not every operand has a scale of its own to share")
            return 0
        pairs = list(dict.fromkeys(m.args[1].args[0] for m in members))  # type: ignore[union-attr]
        if len(pairs) < 2:
            return 0
        if any(p.target is not qparams.AFFINE_QPARAMS or p.args[2:] != pairs[0].args[2:] for p in pairs):
            self.decline(result, concat, "its operands have different formats")
            return 0
        inner = operands(concat).values()
        sources = list(dict.fromkeys(m.args[1].args[0] for m in inner))  # type: ignore[union-attr]
        order = {node: i for i, node in enumerate(graph.nodes)}
        last = max(sources, key=order.__getitem__)
        if any(order[user] < order[last] for m in inner for user in m.users):
            self.decline(result, concat, "an operand is used quantized before the others' ranges are known")
            return 0
        with graph.inserting_after(last):
            shared = self._shared(graph, sources, last)
        for member in members:
            member.update_arg(1, shared[0])
            member.update_arg(2, shared[1])
        for member in inner:
            shared[1].append(member)  # behind the scale that it now reads
        drop_dead_nodes(graph)
        return 1

    def _shared(self, graph: fx.Graph, pairs: list[fx.Node], last: fx.Node) -> tuple[fx.Node, fx.Node]:
        nodes: list[fx.Node] = []

        def after(make):  # type: ignore[no-untyped-def]
            with graph.inserting_after(nodes[-1] if nodes else last):
                nodes.append(make())
            return nodes[-1]

        low, high = pairs[0].args[:2]
        for pair in pairs[1:]:
            left, right = low, pair.args[0]
            low = after(lambda left=left, right=right: call(graph, aten.minimum.default, left, right, like=last))
            left, right = high, pair.args[1]
            high = after(lambda left=left, right=right: call(graph, aten.maximum.default, left, right, like=last))
        both = after(lambda: call(graph, qparams.AFFINE_QPARAMS, low, high, *last.args[2:], like=last))
        return after(lambda: item(graph, both, 0)), after(lambda: item(graph, both, 1))
