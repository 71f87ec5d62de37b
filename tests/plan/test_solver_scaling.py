"""The solver's work grows with the edges of a graph, whatever their shape: uses looked at are counted, not seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import fx

from fxquant.graph import lift as lift_module
from fxquant.graph.kinds import operands
from fxquant.graph.lift import Lifting, lift
from fxquant.graph.moves import passes_values
from fxquant.plan.solver import place
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME

aten = torch.ops.aten
VALUE = torch.empty(2, 4, 6, 6, device="meta")


class Graph(fx.Graph):
    """Convolutions and what stands between them, all of one shape."""

    def call(self, op: Any, *args: Any) -> fx.Node:
        node = self.call_function(op, args)
        node.meta["val"] = VALUE
        return node

    def input(self, name: str, *, state: bool = False) -> fx.Node:
        node = self.placeholder(name)
        node.meta.update(val=VALUE, state=state)
        return node

    def conv(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        return self.call(aten.relu.default, self.call(aten.conv2d.default, x, weight))


def fan(size: int, through: Callable[[Graph, fx.Node], fx.Node], floats: bool) -> fx.Graph:
    """One max pool, read by ``size`` convolutions, and by one operator in float."""
    graph = Graph()
    x, weight = graph.input("x"), graph.input("w", state=True)
    pooled = graph.call(aten.max_pool2d.default, graph.conv(x, weight), [3, 3])
    outs = [graph.conv(through(graph, pooled), weight) for _ in range(size)]
    graph.output([*outs, *([graph.call(aten.sin.default, pooled)] if floats else [])])
    return graph


def direct(graph: Graph, pooled: fx.Node) -> fx.Node:
    return pooled


def own_view(graph: Graph, pooled: fx.Node) -> fx.Node:
    return graph.call(aten.view.default, pooled, [2, 4, 6, 6])


def dense(size: int) -> fx.Graph:
    """Each layer reads the concat of all before it: size² / 2 edges."""
    graph = Graph()
    x, weight = graph.input("x"), graph.input("w", state=True)
    features = [graph.conv(x, weight)]
    for _ in range(size):
        features.append(graph.conv(graph.call(aten.cat.default, list(features), 1), weight))
    graph.output(features[-1])
    return graph


def wide(size: int) -> fx.Graph:
    """One concat of all the layers."""
    graph = Graph()
    x, weight = graph.input("x"), graph.input("w", state=True)
    parts = [graph.conv(x, weight) for _ in range(size)]
    graph.output(graph.conv(graph.call(aten.cat.default, parts, 1), weight))
    return graph


GRAPHS: dict[str, tuple[Callable[[int], fx.Graph], int]] = {  # with how much more work four times the size may be
    "fan": (lambda size: fan(size, direct, False), 5),
    "fan with a float reader": (lambda size: fan(size, direct, True), 5),
    "fan of views": (lambda size: fan(size, own_view, False), 5),
    "fan of views with a float reader": (lambda size: fan(size, own_view, True), 5),
    "one concat": (wide, 5),
    "a concat for each layer": (dense, 20),
}


def work(graph: fx.Graph) -> int:
    """Uses looked at, and operands read from arguments, while placing."""
    count = 0
    covers_use, read = Lifting._covers_use, lift_module.operands

    def covering(self: Lifting, node: fx.Node, user: fx.Node) -> bool:
        nonlocal count
        count += 1
        return covers_use(self, node, user)

    def reading(node: fx.Node) -> dict[str, fx.Node]:
        nonlocal count
        found = read(node)
        count += 1 + len(found)
        return found

    with patch.object(Lifting, "_covers_use", covering), patch.object(lift_module, "operands", reading):
        place(graph, INT8, ONNXRUNTIME)
    return count


@pytest.mark.parametrize("name", GRAPHS)
def test_four_times_the_graph(name: str) -> None:
    make, allowed = GRAPHS[name]
    small, large = work(make(12)), work(make(48))
    assert large <= allowed * small, f"{small} → {large}"


def reference(edges: set[tuple[fx.Node, str]], graph: fx.Graph) -> set[fx.Node]:
    """The oracle: lifted nodes by the definition, looked for again until nothing is added."""
    lifted: set[fx.Node] = set()

    def covered(node: fx.Node, user: fx.Node) -> bool:
        names = [name for name, operand in operands(user).items() if operand is node]
        uses = list(torch.utils._pytree.tree_leaves((user.args, user.kwargs))).count(node)
        return user in lifted or (len(names) == uses and all((user, name) in edges for name in names))

    while True:
        below = {operands(user)[name] for user, name in edges} | {n.all_input_nodes[0] for n in lifted}
        found = {n for n in below if passes_values(n) and all(covered(n, user) for user in n.users)}
        if found <= lifted:
            return lifted
        lifted |= found


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("missing", [None, 0, 3])
def test_lifting_is_its_definition_also_after_drops(name: str, missing: int | None) -> None:
    graph = GRAPHS[name][0](5)
    consumers = [node for node in graph.nodes if node.op == "call_function" and operands(node)]
    edges = {(node, operand) for node in consumers for operand in operands(node) if operand != "weight"}
    lifting = lift(edges, passes_values)
    assert lifting.lifted == reference(edges, graph)
    for dropped in consumers[missing:] if missing is not None else ():
        lifting.drop(dropped)
        edges -= {(dropped, operand) for operand in operands(dropped)}
        assert lifting.lifted == reference(edges, graph)
        fresh = lift(edges, passes_values)
        assert all(lifting.covers(node) == fresh.covers(node) for node in graph.nodes)
        assert all(lifting.source(edge) is fresh.source(edge) for edge in edges)


def test_a_tensor_that_an_operator_uses_twice_is_covered_only_for_both() -> None:
    graph = Graph()
    pooled = graph.call(aten.max_pool2d.default, graph.input("x"), [3, 3])
    product = graph.call(aten.matmul.default, pooled, pooled)
    graph.output(product)
    assert not lift({(product, "lhs")}, passes_values).covers(pooled)
    both = lift({(product, "lhs"), (product, "rhs")}, passes_values)
    assert both.covers(pooled) and both.lifted == {pooled}
    both.drop(product)
    assert not both.covers(pooled) and both.lifted == set()
    joined = graph.call(aten.cat.default, [pooled, pooled])
    assert not lift({(joined, "operand0"), (product, "lhs"), (product, "rhs")}, passes_values).covers(pooled)
