"""Demands walk up through what only moves values, as far as every use is a demand."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxquant.graph.lift import Lifting, Operand, lift
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


class Net:
    """``x → y = relu(x) → view → t``, read by products."""

    def __init__(self) -> None:
        self.graph = ByHand()
        self.x, self.w = self.graph.input("x", 2, 8), self.graph.input("w", 4, 4, state=True)
        self.y = self.graph.call(aten.relu.default, self.x)
        self.view = self.graph.call(aten.view.default, self.y, [4, 4])
        self.turned = self.graph.call(aten.t.default, self.view)

    def product(self, value: fx.Node) -> Operand:
        return self.graph.call(aten.mm.default, value, self.w), "lhs"


def test_a_chain_is_lifted_to_what_is_computed() -> None:
    net = Net()
    edge = net.product(net.turned)
    lifting = lift([edge])
    assert lifting.lifted == {net.turned, net.view}
    assert lifting.source(edge) is net.y
    assert lifting.covers(net.y) and not lifting.covers(net.x)


def test_demands_on_one_tensor_meet() -> None:
    net = Net()
    edges = [net.product(net.turned), net.product(net.view)]
    lifting = lift(edges)
    assert {lifting.source(edge) for edge in edges} == {net.y}


def test_a_float_use_stops_the_walk_there() -> None:
    net = Net()
    edge = net.product(net.turned)
    net.graph.call(aten.neg.default, net.view)
    lifting = lift([edge])
    assert lifting.lifted == {net.turned}
    assert lifting.source(edge) is net.view
    assert not lifting.covers(net.view)


def test_an_undemanded_operand_is_a_float_use() -> None:
    net = Net()
    edge = net.product(net.turned)
    net.product(net.turned)
    lifting = lift([edge])
    assert not lifting.lifted and lifting.source(edge) is net.turned


def test_a_tensor_that_is_both_operands_needs_both() -> None:
    net = Net()
    square = net.graph.call(aten.mm.default, net.turned, net.turned)
    assert lift([(square, "lhs")]).lifted == set()
    assert lift([(square, "lhs"), (square, "rhs")]).lifted == {net.turned, net.view}


def test_a_use_besides_operands_is_in_float() -> None:
    """As an addmm's bias, which is no operand of it."""
    net = Net()
    value = net.graph.call(aten.view.default, net.graph.call(aten.relu.default, net.w), [4, 4])
    node = net.graph.call(aten.addmm.default, value, value, net.w)
    assert lift([(node, "input")]).lifted == set()


def test_only_what_may_be_passed_is_lifted() -> None:
    net = Net()
    edge = net.product(net.turned)
    lifting = lift([edge], lambda node: node is net.turned)
    assert lifting.lifted == {net.turned} and lifting.source(edge) is net.view


def test_what_nothing_reads_is_not_covered() -> None:
    net = Net()
    assert not Lifting(set()).covers(net.turned)


def test_dropping_a_demand_takes_lifts_back() -> None:
    net = Net()
    stays, goes = net.product(net.view), net.product(net.turned)
    lifting = lift([stays, goes])
    assert lifting.lifted == {net.view, net.turned} and lifting.covers(net.y)
    lifting.drop(goes[0])
    assert lifting.edges == {stays}
    assert lifting.lifted == set()
    assert not lifting.covers(net.view) and not lifting.covers(net.turned)
    assert lifting.source(stays) is net.view


def test_dropping_leaves_other_chains() -> None:
    net = Net()
    other = net.graph.call(aten.view.default, net.graph.call(aten.neg.default, net.y), [4, 4])
    stays, goes = net.product(other), net.product(net.turned)
    lifting = lift([stays, goes])
    lifting.drop(goes[0])
    assert lifting.lifted == {other}


@pytest.mark.parametrize("readers", [1, 5])
def test_counts_after_drops_are_those_of_a_new_lifting(readers: int) -> None:
    net = Net()
    edges = [net.product(net.turned) for _ in range(readers)] + [net.product(net.view)]
    lifting = lift(edges)
    lifting.drop(edges[-1][0])
    fresh = Lifting(set(edges[:-1]), set(lifting.lifted))
    for node in (net.y, net.view, net.turned):
        assert lifting.covers(node) == fresh.covers(node)
