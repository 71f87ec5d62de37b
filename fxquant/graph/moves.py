"""Operators that move values and compute none."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import fx

from fxquant.graph.nodes import packet

aten = torch.ops.aten

# Ops that move values and compute none: a per-tensor quantizer commutes with them. Those that cut a tensor
# into parts (split, select, slice) are left out: the parts deserve ranges of their own.
AGNOSTIC = frozenset(
    {
        *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
        *(aten.permute, aten.transpose, aten.t, aten.mT, aten.contiguous, aten.clone, aten.expand, aten.alias),
        *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d),
    }
)

# Pads whose values are those of the tensor, or zeros, which every format holds: see `is_agnostic`.
PADS = frozenset(
    {
        *(aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
        *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
    }
)

ZEROS = frozenset({aten.zeros, aten.zeros_like, aten.new_zeros})
DROPOUT = frozenset({aten.dropout, aten.feature_dropout})


def is_agnostic(node: fx.Node) -> bool:
    """Moves values only; dropout counts where it is switched off, and a pad that adds zeros or repeats values."""
    if node.op != "call_function":
        return False
    if packet(node) is aten.slice:  # ``x[:]``, which is traced only where the size is symbolic
        given = list(node.args[2:])
        return all(value in whole for value, whole in zip(given, ((None, 0), (None, sys.maxsize), (1,)), strict=False))
    if packet(node) in PADS:
        value = node.args[3:] if packet(node) is aten.pad else node.args[2:]
        return not any((*value, node.kwargs.get("value")))
    return packet(node) in AGNOSTIC or (packet(node) in DROPOUT and node.args[2] is False)


def unmoved(value: fx.Node, moves: Callable[[fx.Node], bool] = is_agnostic) -> fx.Node:
    """The tensor that a value is, moved at most."""
    while moves(value):
        value = value.all_input_nodes[0]
    return value


def passes_values(node: fx.Node) -> bool:
    """Agnostic, counting every dropout: what holds in the deployed graph, whatever mode was captured."""
    return is_agnostic(node) or (node.op == "call_function" and packet(node) in DROPOUT)
