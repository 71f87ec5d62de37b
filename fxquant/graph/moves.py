"""Operators that move values and compute none: one table of what each does, and the sets that are read from it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument
from fxquant.graph.nodes import packet

aten, prims = torch.ops.aten, torch.ops.prims

# "ones": adds or drops dimensions of one element; "picks": the greatest of several; "drops": zeros some at random.
How = Literal[
    "aliases",
    "copies",
    "detaches",
    "reshapes",
    "ones",
    "permutes",
    "repeats",
    "picks",
    "parts",
    "casts",
    "pads",
    "drops",
]


@dataclass(frozen=True)
class Move:
    """What an operator does with the values of its first operand.

    ``composite``: captured graphs have it, and those that AOTAutograd and Inductor made have other operators for it.
    """

    how: How
    composite: bool = False


MOVES: dict[Any, Move] = {
    aten.alias: Move("aliases"),
    aten.clone: Move("copies"),
    aten.contiguous: Move("copies", composite=True),
    aten.detach: Move("detaches"),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view), Move("reshapes")),
    **dict.fromkeys((aten.flatten, aten.unflatten), Move("reshapes", composite=True)),
    **dict.fromkeys((aten.squeeze, aten.unsqueeze), Move("ones")),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), Move("permutes")),
    aten.mT: Move("permutes", composite=True),
    aten.expand: Move("repeats"),
    **dict.fromkeys((aten.upsample_nearest1d, aten.upsample_nearest2d), Move("repeats", composite=True)),
    **dict.fromkeys((aten.max_pool1d, aten.max_pool2d, aten.max_pool3d), Move("picks", composite=True)),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.slice, aten.select, aten.unbind), Move("parts")),
    aten.chunk: Move("parts", composite=True),
    **dict.fromkeys((aten._to_copy, prims.convert_element_type), Move("casts")),
    **dict.fromkeys((aten.to, aten.type_as), Move("casts", composite=True)),
    **dict.fromkeys(
        (
            *(aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
            *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
        ),
        Move("pads", composite=True),
    ),
    **dict.fromkeys((aten.dropout, aten.feature_dropout), Move("drops", composite=True)),
}


def moves(*how: How, composite: bool = True) -> frozenset[Any]:
    """The operators that do one of these things; without composite ones if these are not wanted."""
    return frozenset(op for op, move in MOVES.items() if move.how in how and (composite or not move.composite))


# A per-tensor quantizer commutes with these. Those that cut a tensor into parts are left out: the parts deserve ranges
# of their own.
AGNOSTIC = moves("aliases", "copies", "reshapes", "ones", "permutes", "repeats", "picks")
COPYING = moves("copies")
RESHAPING = moves("reshapes")
PERMUTING = moves("permutes")
REPEATING = moves("repeats")
PARTING = moves("parts")
PADS = moves("pads")  # with values of the tensor, or with zeros, which every format holds: see `is_agnostic`
DROPOUT = moves("drops")
CASTS = moves("casts") - {prims.convert_element_type}  # of captured graphs

# In joint and later graphs.
KEEPING = moves("aliases", "copies", "detaches")  # values and shape
SHAPING = moves("reshapes", "ones", "repeats", composite=False)
TURNING = moves("permutes", composite=False)
CASTING = moves("casts", composite=False)
ALL_ONCE = moves("aliases", "copies", "reshapes", "ones", "permutes", composite=False)  # each element of the operand
MOVING = KEEPING - {aten.contiguous} | SHAPING | TURNING | CASTING | RESHAPING | moves("parts", composite=False)

ZEROS = frozenset({aten.zeros, aten.zeros_like, aten.new_zeros})
_WHOLE = {"start": (None, 0), "end": (None, sys.maxsize), "step": (1,)}  # of a slice that takes all


def is_agnostic(node: fx.Node) -> bool:
    """Moves values only; dropout counts where it is switched off, and a pad that adds zeros or repeats values."""
    if node.op != "call_function":
        return False
    if packet(node) is aten.slice:  # ``x[:]``, which is traced only where the size is symbolic
        return all(argument(node, name) in whole for name, whole in _WHOLE.items())
    if packet(node) in PADS:
        return not (has_argument(node, "value") and argument(node, "value"))
    return packet(node) in AGNOSTIC or (packet(node) in DROPOUT and argument(node, "train") is False)


def passes_values(node: fx.Node) -> bool:
    """Agnostic, counting every dropout: what holds in the deployed graph, whatever mode was captured."""
    return is_agnostic(node) or (node.op == "call_function" and packet(node) in DROPOUT)


def is_moving(node: fx.Node) -> bool:
    """Whether a node of a joint graph hands on its first operand's values: a view, a copy, a cast, or a part."""
    if node.op != "call_function":
        return False
    return node.target is operator.getitem or packet(node) in MOVING


def unmoved(value: fx.Node, moves: Callable[[fx.Node], bool] = is_agnostic) -> fx.Node:
    """The tensor that a value is, moved at most."""
    while moves(value):
        value = value.all_input_nodes[0]
    return value
