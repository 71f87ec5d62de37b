"""What a node of an ATen graph is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.meta import STATE
from fxquant.ops.marks import BIND

aten = torch.ops.aten
_SIZES = frozenset({aten.sym_size, aten.sym_stride, aten.sym_numel})
_SHAPED_AS = frozenset({aten.reshape_as, aten.view_as, aten.expand_as})  # torch.export leaves them whole


def packet(node: fx.Node) -> Any:
    """The node's OpOverloadPacket, or its target where it is no ATen call."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def gives_floats(node: fx.Node) -> bool:
    """Whether the node's value, or the first of several, is a floating-point tensor: a bag of embeddings has four."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The single user that reads a node's values; those that ask for its sizes alone do not count."""
    readers = [user for user in node.users if not _asks_for_sizes(user, node)]
    return readers[0] if len(readers) == 1 else None


def _asks_for_sizes(user: fx.Node, node: fx.Node) -> bool:
    name = packet(user)
    return name in _SIZES or (name in _SHAPED_AS and argument(user, "self") is not node)


def is_bind(node: fx.Node) -> bool:
    """Whether the node marks the frame of an owner."""
    return node.op == "call_function" and node.target is BIND


def is_state(node: fx.Node) -> bool:
    """Whether a placeholder holds a parameter or buffer; capture marks those."""
    return bool(node.meta.get(STATE))


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph gives back."""
    (values,) = graph.output_node().args
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def call_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The call_function nodes in order."""
    return (node for node in graph.nodes if node.op == "call_function")
