"""The scale of attention's scores is taken into the quantizer of an operand: the product then meets its softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at, has_argument
from fxquant.graph.edit import call
from fxquant.graph.kinds import operands, replace_operand
from fxquant.graph.nodes import call_nodes, only_user, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.pairs import MATMULS, pair_before, quantized_again
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten

# What stands between the scores of attention and their softmax.
_MASKING = frozenset({aten.add, aten.masked_fill, aten.where})


@dataclass(frozen=True, kw_only=True)
class ScaleOperand(Pass):
    """``softmax(matmul(QDQ(q, s), k) · c)``  →  ``softmax(matmul(QDQ(QDQ(q, s) · c, s·c), k))`` with equal codes."""

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Moves factors of products that only a softmax reads, through a mask or not."""
        return sum(_move(node) for node in list(call_nodes(gm.graph)) if packet(node) in (aten.mul, aten.div))


def _move(node: fx.Node) -> bool:
    product, factor = argument_at(node, 0), _factor(node)
    if factor is None or not isinstance(product, fx.Node) or not _meets_softmax(node):
        return False
    if packet(product) not in MATMULS or len(product.users) > 1:
        return False
    read = operands(product)
    left, pair = read["lhs"], pair_before(read["lhs"])
    if pair is None or pair_before(read["rhs"]) is None:
        return False
    with node.graph.inserting_before(product):
        scaled = call(node.graph, aten.mul.Tensor, left, factor, like=left)
    replace_operand(product, "lhs", quantized_again(scaled, pair, factor))
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)
    return True


def _factor(node: fx.Node) -> float | None:
    """What a product or quotient multiplies by, where it is a positive number."""
    factor = argument_at(node, 1)
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        return None
    if has_argument(node, "rounding_mode") and argument(node, "rounding_mode") is not None:
        return None
    return 1.0 / factor if packet(node) is aten.div else float(factor)


def _meets_softmax(node: fx.Node) -> bool:
    """Whether nothing but a mask stands between a value and its softmax."""
    user = only_user(node)
    while user is not None and packet(user) in _MASKING:
        user = only_user(user)
    return user is not None and packet(user) is aten.softmax
