"""Q/DQ pairs directly before a product and after it, for compilers that look for just that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.moves import is_agnostic
from fxquant.graph.nodes import call_nodes, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.pairs import CONVOLUTIONS, MATMULS, Pair, is_quantized_again, pair_before, quantized_again
from fxquant.passes.stages import EXPORT

PRODUCTS = MATMULS | CONVOLUTIONS | {torch.ops.aten.linear, torch.ops.aten.addmm}
# What a kernel computes in the same step as a product, before it quantizes the result.
EPILOGUES = frozenset({torch.ops.aten.relu, torch.ops.aten.relu_, torch.ops.aten.hardtanh, torch.ops.aten.clamp})


@dataclass(frozen=True, kw_only=True)
class QuantizeAtProducts(Pass):
    """``linear(flatten(QDQ(x)), w)``  →  ``linear(QDQ(flatten(x)), w)``, for all that moves values and no more.

    The codes are the same ones, in another order. A pair that others read as well stays where it is, and the values are
    quantized again, to the same codes: ``linear(QDQ(flatten(QDQ(x))), w)``.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Moves pairs to the products that read them."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if packet(node) not in PRODUCTS:
                continue
            for value in node.all_input_nodes[:2]:
                pair = pair_before(value)
                if pair is None or Pair.of(value) is not None or is_quantized_again(value, pair):
                    continue
                users = list(value.users)
                again = quantized_again(value, pair)
                for user in users:
                    user.replace_input_with(value, again)
                if len(pair.node.users) == 1 and _is_chain(pair.node, value):
                    pair.node.replace_all_uses_with(pair.input)
                    gm.graph.erase_node(pair.node)
                done += 1
        return done


def _is_chain(first: fx.Node, last: fx.Node) -> bool:
    """Whether each value from one to the other has one reader: nothing else reads quantized values."""
    node = first
    while node is not last:
        if len(node.users) != 1:
            return False
        (node,) = node.users
    return True


@dataclass(frozen=True, kw_only=True)
class QuantizeResults(Pass):
    """``QDQ(transpose(linear(x, w)))``  →  ``QDQ(transpose(QDQ(linear(x, w))))`` with the same scale: the same codes.

    For runtimes that look for the pair right after the product, or its ReLU. Where readers quantize the result by
    different scales, or one does not, it stays.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Quantizes results before they are moved."""
        done = 0
        for node in [node for node in call_nodes(gm.graph) if packet(node) in PRODUCTS]:
            end = node
            while len(end.users) == 1 and packet(next(iter(end.users))) in EPILOGUES:
                end = next(iter(end.users))
            pairs = _pairs_after(end)
            if pairs is None or all(Pair.of(user) is not None for user in end.users):
                continue
            if len({(pair.scale, pair.zero_point, pair.limits, pair.element) for pair in pairs}) == 1:
                users = list(end.users)
                again = quantized_again(end, pairs[0])
                for user in users:
                    user.replace_input_with(end, again)
                done += 1
        return done


def _pairs_after(value: fx.Node) -> list[Pair] | None:
    """Those that read a value, moved at most; None where something else does, or nothing."""
    found: list[Pair] = []
    for user in value.users:
        pair = Pair.of(user)
        more = [pair] if pair is not None else _pairs_after(user) if is_agnostic(user) else None
        if more is None:
            return None
        found += more
    return found or None
