"""Constants of an exported graph: attributes of its module, and the nodes that read them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.edit import call


def held_name(name: str) -> str:
    """What a constant is called in the exported file."""
    return name.replace(".", "__").replace("@", "__")


def constant(gm: fx.GraphModule, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    """A buffer of ``gm`` holding ``value``, and the node that reads it, at the insertion point."""
    target = held_name(name)
    while hasattr(gm, target):
        target += "_"
    value = value.contiguous()
    gm.register_buffer(target, value)
    node = gm.graph.get_attr(target)
    around: list[Any] = [each.meta.get("val") for each in (like, *like.all_input_nodes)]
    mode = next(fake.fake_mode for fake in around if hasattr(fake, "fake_mode"))
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def constant_value(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    value = operator.attrgetter(str(node.target))(gm)
    assert isinstance(value, torch.Tensor), f"{node.target} must be a tensor: got {type(value).__name__}"
    return value.detach()


def negated(gm: fx.GraphModule, value: fx.Node) -> fx.Node:
    """``−value``, a constant of a constant."""
    if value.op != "get_attr":
        return call(gm.graph, torch.ops.aten.neg.default, value, like=value)
    return constant(gm, f"{value.target}_negated", -constant_value(gm, value), value)
