"""What a node is."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxquant.graph.nodes import call_nodes, is_bind, is_float, is_state, only_user, packet, results
from fxquant.ops.marks import BIND
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


def test_packet_is_that_of_all_overloads() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert packet(graph.call_function(aten.add.Tensor, (x, x))) is aten.add
    assert packet(graph.call_function(aten.add.Scalar, (x, 1))) is aten.add
    assert packet(graph.call_function(operator.getitem, (x, 0))) is operator.getitem
    assert packet(x) == "x"


def test_one_floating_tensor() -> None:
    graph = ByHand()
    x, n = graph.input("x", 2), graph.input("n", 2, dtype=torch.int64)
    both = graph.call(aten.var_mean.correction, x)
    assert is_float(x) and not is_float(n) and not is_float(both)
    assert is_float(graph.input("h", 2, dtype=torch.float16))
    assert not is_float(graph.placeholder("without"))


def test_only_user() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    assert only_user(x) is None
    y = graph.call(aten.add.Tensor, x, x)
    assert only_user(x) is y
    graph.call(aten.neg.default, x)
    assert only_user(x) is None


def test_marks_and_state() -> None:
    graph = ByHand()
    x, w = graph.input("x", 2), graph.input("w", 2, state=True)
    bind = graph.call_function(BIND, ("key", [], []))
    assert [is_bind(node) for node in (x, w, bind)] == [False, False, True]
    assert [is_state(node) for node in (x, w, bind)] == [False, True, False]


def test_calls_and_results() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    y = graph.call(aten.neg.default, x)
    graph.output((y, None))
    assert list(call_nodes(graph)) == [y]
    assert results(graph) == (y, None)


def test_a_single_result() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    graph.output(x)
    assert results(graph) == (x,)
