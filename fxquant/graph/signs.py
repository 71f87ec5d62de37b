"""On which side of zero the values of a tensor are, as far as the operator that makes it says so."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.kinds import activation_name
from fxquant.graph.nodes import packet

aten = torch.ops.aten

_POSITIVE = frozenset({aten.softmax, aten.sigmoid})  # besides ReLUs
_NORMS = frozenset({aten.layer_norm, aten.rms_norm, aten.group_norm})
_PRODUCTS = frozenset({aten.linear, aten.addmm, aten.matmul, aten.bmm, aten.mm, aten.scaled_dot_product_attention})


def is_positive(node: fx.Node) -> bool:
    """Whether no value is negative."""
    return activation_name(node) is not None or (node.op == "call_function" and packet(node) in _POSITIVE)


def is_even(node: fx.Node) -> bool:
    """Whether values lie on both sides of zero about alike: what a norm or a product gives, dropped out at most."""
    while node.op == "call_function" and packet(node) is aten.dropout:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and packet(node) in _NORMS | _PRODUCTS
