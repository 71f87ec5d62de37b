"""Editing: new nodes know their values and origin; what is dead goes, and what writes stays."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph.edit import call, copied, drop_dead_nodes, is_normalization, item, mutates, without_dead_nodes
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


def origin(graph: ByHand) -> fx.Node:
    x = graph.input("x", 2, 3)
    x.meta.update(nn_module_stack={"k": ("fc", torch.nn.Linear)}, stack_trace="here", region="r", recompute=1)
    return x


def test_a_new_node_has_its_value_and_the_origin_of_another() -> None:
    graph = ByHand()
    x = origin(graph)
    node = call(graph, aten.sum.dim_IntList, x, [1], keepdim=True, like=x)
    assert node.meta["val"].shape == (2, 1)
    assert {key: node.meta[key] for key in ("stack_trace", "region")} == {"stack_trace": "here", "region": "r"}
    assert node.meta["nn_module_stack"] == x.meta["nn_module_stack"]
    assert "recompute" not in node.meta
    assert node.args == (x, [1]) and dict(node.kwargs) == {"keepdim": True}


def test_a_new_node_stands_at_the_insertion_point() -> None:
    graph = ByHand()
    x = origin(graph)
    last = graph.call(aten.neg.default, x)
    with graph.inserting_before(last):
        node = call(graph, aten.exp.default, x, like=x)
    assert [each.name for each in graph.nodes] == ["x", node.name, last.name]


def test_a_constant_is_computed_beside_another_value() -> None:
    graph = ByHand()
    x = origin(graph)
    node = call(graph, aten.full.default, [1], 3.0, like=x)
    assert node.meta["val"].shape == (1,)


def test_no_fake_value_is_our_bug() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    with pytest.raises(AssertionError, match=r"aten.neg.default has no fake operand"):
        call(graph, aten.neg.default, x, like=x)


def test_item_is_one_result() -> None:
    graph = ByHand()
    x = origin(graph)
    both = call(graph, aten.var_mean.correction, x, [1], like=x)
    mean = item(graph, both, 1)
    assert mean.target is operator.getitem and mean.args == (both, 1)
    assert mean.meta["val"] is both.meta["val"][1]
    assert mean.meta["region"] == "r"


def test_a_copy_is_apart_over_the_same_attributes() -> None:
    graph = ByHand()
    x = origin(graph)
    gm = graph.module(graph.call(aten.neg.default, x))
    copy = copied(gm)
    assert copy.code == gm.code
    (other,) = copy.graph.find_nodes(op="placeholder")
    other.meta["region"] = "elsewhere"
    copy.graph.call_function(aten.exp.default, (other,))
    assert x.meta["region"] == "r" and len(x.users) == 1


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.add_.Tensor, (1,), True),
        (aten.add.Tensor, (1,), False),
        (aten.batch_norm.default, (None, None, None, None, True, 0.1, 1e-5, False), True),
        (aten.instance_norm.default, (None, None, None, None, True, 0.1, 1e-5, False), True),
        (operator.getitem, (0,), False),
    ],
)
def test_mutates(op: Any, args: tuple[Any, ...], expected: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(op, (graph.placeholder("x"), *args))
    assert mutates(node) == expected
    assert is_normalization(node) == (op in (aten.batch_norm.default, aten.instance_norm.default))
    assert not mutates(node.all_input_nodes[0])


def test_dead_nodes_go_and_writes_stay() -> None:
    graph = ByHand()
    x = origin(graph)
    graph.call(aten.exp.default, graph.call(aten.neg.default, x))
    graph.call(aten.add_.Tensor, x, 1)
    result = graph.call(aten.relu.default, x)
    graph.output((result,))
    drop_dead_nodes(graph)
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls == [aten.add_.Tensor, aten.relu.default]


def test_without_dead_nodes_writes_the_code_anew() -> None:
    graph = ByHand()
    x = origin(graph)
    graph.call(aten.exp.default, x)
    gm = graph.module(graph.call(aten.relu.default, x))
    assert "exp" in gm.code
    assert without_dead_nodes(gm) is gm
    assert "exp" not in gm.code and "relu" in gm.code
