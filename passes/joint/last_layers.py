"""The layers whose gradient comes straight from the loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxquant.graph.moves import is_moving
from fxquant.graph.nodes import packet
from fxquant.passes.joint.quantized_products import multiplies

aten = torch.ops.aten


def is_of_last_layer(gradient: fx.Node, after_tangents: set[fx.Node]) -> bool:
    """Whether no product stands between the graph's tangents and a gradient that only one layer's products read.

    That of a classifier's logits is such: of each token one number near 1 and all others near 0. What a block hands on
    beside its layer, as a residual sum, is a gradient like those before it, wherever the graph ends.

    Args:
        gradient: as it is stored, before what moves it.
        after_tangents: the nodes that depend on the gradients of the graph's results.
    """
    if gradient not in after_tangents:
        return False
    stack, seen = [gradient], {gradient}
    while stack:
        node = stack.pop()
        if multiplies(node):
            return False
        new = {source for source in node.all_input_nodes if source in after_tangents} - seen
        seen |= new
        stack += new
    return all(multiplies(reader) or packet(reader) is aten.sum for reader in _readers(gradient))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_moving(user):
            yield from _readers(user)
        else:
            yield user
