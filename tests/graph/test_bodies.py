"""Graphs inside graphs: found, ordered, and told apart."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap

from fxquant.graph.bodies import (
    all_graphs,
    body_operands,
    execution_order,
    is_checkpoint,
    is_transform,
    nested_graphs,
)
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


def inner() -> fx.GraphModule:
    """``exp(a) + b``."""
    graph = ByHand()
    a, b = graph.input("a", 2), graph.input("b", 2)
    return graph.module(graph.call(aten.add.Tensor, graph.call(aten.exp.default, a), b))


class Outer:
    """``neg(checkpoint(body, x, y))``."""

    def __init__(self, body: fx.GraphModule, target: object = tag_activation_checkpoint) -> None:
        graph = ByHand()
        self.x, self.y = graph.input("x", 2), graph.input("y", 2)
        self.given = graph.get_attr("body")
        self.run = graph.call_function(target, (self.given, self.x, self.y))
        self.negative = graph.call_function(aten.neg.default, (self.run,))
        self.gm = graph.module(self.negative, body=body)
        (self.body,) = nested_graphs(self.gm, self.run)


def names(gm: fx.GraphModule) -> list[str]:
    return [str(getattr(node.target, "_schema", node.target)).split("(")[0] for node in execution_order(gm)]


def test_nested_graphs() -> None:
    outer = Outer(inner())
    assert outer.body is outer.gm.body
    assert nested_graphs(outer.gm, outer.negative) == []


def test_an_attribute_that_is_a_tensor_is_no_body() -> None:
    graph = fx.Graph()
    constant = graph.get_attr("table")
    node = graph.call_function(aten.relu.default, (constant,))
    gm = fx.GraphModule({"table": torch.ones(2)}, graph)
    assert nested_graphs(gm, node) == []


def test_bodies_run_where_their_operator_stands() -> None:
    outer = Outer(inner())
    assert names(outer.gm) == ["tag_activation_checkpoint", "aten::exp", "aten::add.Tensor", "aten::neg"]


def test_all_graphs_goes_down() -> None:
    middle = Outer(inner())
    outer = Outer(middle.gm)
    graphs = list(all_graphs(outer.gm))
    assert [len(list(each.graph.nodes)) for each in graphs] == [6, 6, 5]
    assert graphs[0] is outer.gm


def test_body_operands_by_placeholder() -> None:
    outer = Outer(inner())
    a, b = outer.body.graph.find_nodes(op="placeholder")
    assert body_operands(outer.run, outer.body) == {a: outer.x, b: outer.y}


def test_a_body_with_other_inputs_is_our_bug() -> None:
    outer = Outer(inner())
    outer.body.graph.placeholder("c")
    with pytest.raises(ValueError, match="shorter"):
        body_operands(outer.run, outer.body)


def test_checkpoints_and_transforms_are_told_apart() -> None:
    checkpoint, transform = Outer(inner()), Outer(inner(), wrap)
    assert is_checkpoint(checkpoint.run) and not is_transform(checkpoint.run)
    assert is_transform(transform.run) and not is_checkpoint(transform.run)
    for node in (checkpoint.x, checkpoint.negative):
        assert not is_checkpoint(node) and not is_transform(node)
