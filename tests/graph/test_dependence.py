"""What depends on parameters, shares memory, and is changed in place."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxquant.graph.dependence import (
    changed_in_place,
    constant_nodes,
    same_views,
    shares_memory,
    weight_computations,
    written_attributes,
    written_operands,
)
from fxquant.ops.marks import BIND
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


class Parametrized:
    """``linear(x, v · g)`` with parameters v and g, and what else could be taken for a weight."""

    def __init__(self) -> None:
        self.graph = graph = ByHand()
        self.x, self.v, self.g = (
            graph.input("x", 2, 4),
            graph.input("v", 3, 4, state=True),
            graph.input("g", state=True),
        )
        self.scaled = graph.call(aten.mul.Tensor, self.v, self.g)
        self.y = graph.call(aten.linear.default, self.x, self.scaled)


def test_constants_depend_on_state_alone() -> None:
    net = Parametrized()
    assert constant_nodes(net.graph) == {net.v, net.g, net.scaled}


def test_what_is_filled_is_constant_and_what_is_random_not() -> None:
    graph = ByHand()
    filled = graph.call(aten.full.default, [2], 1.0)
    graph.call(aten.rand.default, [2])
    assert constant_nodes(graph) == {filled}


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_buffer_that_holds_what_comes_in_is_no_constant(through_a_view: bool) -> None:
    graph = ByHand()
    cache, x = graph.input("cache", 4, 2, state=True), graph.input("x", 1, 2)
    doubled = graph.call(aten.mul.Tensor, cache, 2.0)
    if through_a_view:
        graph.call(aten.copy_.default, graph.call(aten.slice.Tensor, cache, 0, 0, 1), x)
    else:
        graph.call(aten.add_.Tensor, cache, x)
    assert constant_nodes(graph).isdisjoint({cache, doubled})


def test_a_buffer_that_follows_another_such_one_is_no_constant_either() -> None:
    graph = ByHand()
    first, second, x = (graph.input(name, 2, state=name != "x") for name in ("first", "second", "x"))
    graph.call(aten.copy_.default, second, first)
    graph.call(aten.copy_.default, first, x)
    assert constant_nodes(graph) == set()


def test_a_buffer_that_is_computed_from_parameters_stays_one() -> None:
    """As the vectors of a spectral norm are, in each step."""
    graph = ByHand()
    u, w = graph.input("u", 2, state=True), graph.input("w", 2, 2, state=True)
    written = graph.call(aten.copy_.default, u, graph.call(aten.mv.default, w, u))
    assert {u, w, written} <= constant_nodes(graph)


def test_attributes_that_are_written() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    held = [graph.get_attr(name) for name in ("cache", "steps", "read")]
    for node in held:
        node.meta["val"] = x.meta["val"]
    view = graph.call(aten.view.default, held[0], [2, 1])
    graph.call(aten.copy_.default, view, graph.call(aten.view.default, x, [2, 1]))
    graph.call(aten.add_.Tensor, held[1], 1.0)
    graph.call(aten.add_.Tensor, x, held[2])
    assert written_attributes(graph) == ["cache", "steps"]


def test_marks_of_owners_are_no_constants() -> None:
    graph = fx.Graph()
    state = graph.placeholder("min")
    state.meta["state"] = True
    bind = graph.call_function(BIND, ("key", [0], [state]))
    assert bind not in constant_nodes(graph)


def test_a_weight_computation_ends_in_weights() -> None:
    net = Parametrized()
    constants = constant_nodes(net.graph)
    assert weight_computations(net.graph, constants) == constants
    net.graph.call(aten.add.Tensor, net.x, net.g)  # which reads it as a value
    assert weight_computations(net.graph, constants) == {net.v, net.scaled}


def test_a_product_of_two_parameters_that_an_activation_meets_is_no_weight() -> None:
    graph = ByHand()
    x, a, b = graph.input("x", 2, 2), graph.input("a", 2, 2, state=True), graph.input("b", 2, 2, state=True)
    product = graph.call(aten.mm.default, a, b)
    graph.call(aten.mm.default, product, x)  # as its left operand, which is no weight
    assert weight_computations(graph, constant_nodes(graph)) == {b}, "the weight of the first product"


def test_equal_views_are_one() -> None:
    graph = ByHand()
    w = graph.input("w", 4, 4, state=True)
    turned, again = graph.call(aten.t.default, w), graph.call(aten.t.default, w)
    back = graph.call(aten.t.default, again)
    first = same_views(graph, constant_nodes(graph))
    assert first == {w: w, turned: turned, again: turned, back: back}


def test_views_differ_by_their_numbers_however_written() -> None:
    graph = ByHand()
    w = graph.input("w", 2, 3, 4, state=True)
    one = graph.call(aten.transpose.int, w, 0, 1)
    other = graph.call(aten.transpose.int, w, 0, 2)
    by_keyword = graph.call(aten.transpose.int, self=w, dim1=1, dim0=0)
    first = same_views(graph, constant_nodes(graph))
    assert first[other] is other
    assert first[by_keyword] is one


def test_what_computes_is_no_view() -> None:
    graph = ByHand()
    w = graph.input("w", 4, 4, state=True)
    twice = [graph.call(aten.neg.default, w) for _ in range(2)]
    first = same_views(graph, constant_nodes(graph))
    assert [first[node] for node in twice] == twice


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.view.default, ([4],), True),
        (aten.t.default, (), True),
        (aten.relu_.default, (), True),
        (aten.dropout.default, (0.5, False), True),
        (operator.getitem, (0,), True),
        (aten.relu.default, (), False),
        (aten.clone.default, (), False),
    ],
)
def test_shares_memory(op: object, args: tuple[object, ...], expected: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(op, (graph.placeholder("x"), *args))
    assert shares_memory(node) == expected
    assert not shares_memory(node.all_input_nodes[0])


def test_changed_where_it_is_read_again() -> None:
    graph = ByHand()
    x = graph.input("x", 2, 2)
    y, z = graph.call(aten.relu.default, x), graph.call(aten.neg.default, x)
    graph.call(aten.add_.Tensor, y, 1)
    graph.call(aten.add_.Tensor, z, 1)
    graph.call(aten.neg.default, y)
    assert changed_in_place(graph) == {y}


def test_changed_through_a_view() -> None:
    graph = ByHand()
    x = graph.input("x", 2, 2)
    view = graph.call(aten.view.default, x, [4])
    graph.call(aten.zero_.default, view)
    graph.call(aten.neg.default, x)
    assert changed_in_place(graph) == {x}


def test_read_before_the_change_only_is_not_changed() -> None:
    graph = ByHand()
    x = graph.input("x", 2, 2)
    graph.call(aten.neg.default, x)
    graph.call(aten.zero_.default, x)
    assert changed_in_place(graph) == set()


def test_written_operands_however_written() -> None:
    graph = ByHand()
    x, y, out = graph.input("x", 2), graph.input("y", 2), graph.input("out", 2)
    assert written_operands(graph.call(aten.add_.Tensor, x, y)) == [x]
    assert written_operands(graph.call(aten.copy_.default, self=x, src=y)) == [x]
    assert written_operands(graph.call(aten.add.out, x, y, out=out)) == [out]
    assert written_operands(graph.call(aten.add.Tensor, x, y)) == []
    assert written_operands(x) == []


def test_written_operands_in_lists() -> None:
    graph = ByHand()
    x, y = graph.input("x", 2), graph.input("y", 2)
    node = graph.call(aten._foreach_add_.Scalar, [x, y], 1)
    assert written_operands(node) == [x, y]
    graph.call(aten.neg.default, y)
    assert changed_in_place(graph) == {y}
