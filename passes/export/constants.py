"""Constants of an exported graph: attributes of its module, and the nodes that read them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dependence import constant_nodes
from fxquant.graph.edit import call, mutates
from fxquant.graph.nodes import packet
from fxquant.graph.steps import is_random

aten = torch.ops.aten

# Without a tensor to read, they give the same one each time.
_CREATING = frozenset(
    {aten.arange, aten.eye, aten.full, aten.linspace, aten.ones, aten.scalar_tensor, aten.zeros},
)


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


def known_value(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """What a node gives whatever the inputs are, also of numbers in a row and the like; None where it may differ.

    Tensors that the graph writes are not known.
    """
    constants, known = constant_nodes(gm.graph), dict[fx.Node, Any]()

    def value(each: fx.Node) -> Any:
        if each not in known:
            known[each] = None
            if each.op == "get_attr":
                known[each] = constant_value(gm, each) if each in constants else None
            elif _is_fixed(each) and all(value(source) is not None for source in each.all_input_nodes):
                args, kwargs = fx.node.map_arg((each.args, each.kwargs), known.__getitem__)
                assert callable(each.target)
                with torch.no_grad():
                    known[each] = each.target(*args, **kwargs)
        return known[each]

    found = value(node)
    return found if isinstance(found, Tensor) else None


def _is_fixed(node: fx.Node) -> bool:
    """Whether a node's result depends on its operands alone."""
    if node.op != "call_function" or is_random(node) or mutates(node):
        return False
    return bool(node.all_input_nodes) or packet(node) in _CREATING
