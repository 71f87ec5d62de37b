"""Which channel of a tensor each element of another comes from, followed through operators that commute with scales.

Labels are integers shaped like the tensor. An operator commutes if scaling its operand by positive numbers, one for
each label, scales its result alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument, argument_at
from fxquant.graph.kinds import activation_name
from fxquant.graph.moves import PADS, PARTING, is_agnostic, moves
from fxquant.graph.nodes import packet

aten = torch.ops.aten
_POOLS = frozenset({aten.max_pool1d, aten.max_pool2d, aten.max_pool3d}) | {
    *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d),
    *(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d),
    *(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d),
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d),
}
_REDUCED = frozenset({aten.mean, aten.sum, aten.amax})
_SAME = frozenset({aten.leaky_relu, aten.neg, aten.abs})  # beside relu, for which `activation_name` has all spellings
_BATCHED = frozenset({aten.matmul, aten.bmm})
_OTHER_MOVES = moves("detaches") | PARTING


def first_labels(value: fx.Node, dim: int) -> Tensor:
    """The channels of a tensor itself, along ``dim``."""
    shape = [int(n) for n in value.meta["val"].shape]
    view = [1] * len(shape)
    view[dim] = -1
    return torch.arange(shape[dim], dtype=torch.int32).view(view).expand(shape)


def along(labels: Tensor, dim: int) -> Tensor | None:
    """The labels along a dimension, where the others do not change them; None where they do."""
    dim %= labels.dim()
    line = labels
    for other in range(labels.dim()):
        if other != dim:
            line = line.narrow(other, 0, 1)
    return line.reshape(-1) if bool((labels == line).all()) else None


def carried(user: fx.Node, node: fx.Node, labels: Any) -> Any:
    """The labels of an operator's result, ``labels`` being those of its operand ``node``; None: it does not commute."""
    if sum(_is(value, node) for value in user.args) != 1:
        return None
    name = packet(user)
    if activation_name(user) == "relu" or name in _SAME:
        return labels
    if name in _POOLS or name in PADS:
        spread = _spread(user, labels) if name not in PADS or is_agnostic(user) else None
        return spread if isinstance(user.meta["val"], Tensor) else (spread, None)  # indices come after
    if is_agnostic(user) or name in _OTHER_MOVES or getattr(user.target, "__name__", "") == "getitem":
        return _moved(user, node, labels)
    if name in (aten.mul, aten.div):
        return _times(user, node, labels)
    if name in _REDUCED:
        return _reduced(user, labels)
    if name in _BATCHED or name is aten.scaled_dot_product_attention:
        return _mixed(user, node, labels)
    return None


def _is(value: object, node: fx.Node) -> bool:
    return value is node


def _shape(node: fx.Node) -> list[int]:
    """Of the result, or of the first of several."""
    value = node.meta["val"]
    return [int(n) for n in (value[0] if isinstance(value, (tuple, list)) else value).shape]


def _moved(user: fx.Node, node: fx.Node, labels: Any) -> Any:
    """By the operator itself."""
    if user.all_input_nodes != [node]:
        return None  # sizes that the graph computes
    args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda _: labels)
    assert callable(user.target)
    return user.target(*args, **kwargs)


def _spread(user: fx.Node, labels: Tensor) -> Tensor | None:
    """Of an operator that mixes places of one channel: its operand has one label over each channel's places."""
    shape = _shape(user)
    spatial = len(shape) - 2 if len(shape) > 2 else 1
    place = labels
    for dim in range(len(shape) - spatial, len(shape)):
        place = place.narrow(dim, 0, 1)
    return place.expand(shape) if bool((labels == place).all()) else None


def _times(user: fx.Node, node: fx.Node, labels: Tensor) -> Tensor | None:
    """By a number, or by another tensor: of the two only ``node`` is scaled."""
    if packet(user) is aten.div and (argument_at(user, 0) is not node or user.target not in _PLAIN_DIVISIONS):
        return None
    return labels if list(labels.shape) == _shape(user) else None


_PLAIN_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)


def _reduced(user: fx.Node, labels: Tensor) -> Tensor | None:
    if user.target not in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default):
        return None
    dims = argument(user, "dim") or list(range(labels.dim()))
    kept = labels
    for dim in dims:
        kept = kept.narrow(dim, 0, 1)
    return kept.reshape(_shape(user)) if bool((labels == kept).all()) else None


def _mixed(user: fx.Node, node: fx.Node, labels: Tensor) -> Tensor | None:
    """Of attention's values, and of either side of a product of activations: the other side is not scaled."""
    if packet(user) is aten.scaled_dot_product_attention:
        is_right = argument(user, "value") is node and argument(user, "query") is not node
    else:
        is_right = argument_at(user, 1) is node
    if packet(user) is aten.scaled_dot_product_attention and not is_right:
        return None
    summed = -2 if is_right else -1
    if labels.dim() != len(_shape(user)) or labels.dim() < 2:
        return None
    line = labels.narrow(summed, 0, 1)
    if not bool((labels == line).all()):
        return None
    shape = _shape(user)
    return line.expand(shape) if all(a in (1, b) for a, b in zip(line.shape, shape, strict=True)) else None
