"""Attention that is written out: products whose result meets a softmax, or whose left operand comes out of one."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.kinds import Kind, operands
from fxquant.graph.moves import MOVES
from fxquant.graph.nodes import packet

aten = torch.ops.aten

_SOFTMAX = frozenset({aten.softmax, aten._softmax, aten._safe_softmax})

# What stands between the scores of attention and their softmax, or between that and the product with the values.
_BETWEEN = frozenset({aten.mul, aten.div, aten.add, aten.sub, aten.masked_fill, aten.where, aten.dropout, *MOVES})


def is_attention(node: fx.Node, kind: Kind) -> bool:
    """Whether a node is an attention, or one of the two products of one that is written out."""
    if kind.name == "sdpa":
        return True
    return kind.name == "matmul" and (_meets_softmax(node) or _comes_from_softmax(operands(node)["lhs"]))


def _meets_softmax(node: fx.Node) -> bool:
    users = list(node.users)
    while len(users) == 1 and packet(users[0]) in _BETWEEN:
        users = list(users[0].users)
    return bool(users) and all(packet(user) in _SOFTMAX for user in users)


def _comes_from_softmax(value: fx.Node) -> bool:
    while packet(value) in _BETWEEN and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return packet(value) in _SOFTMAX
