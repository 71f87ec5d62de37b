"""Work is counted as two operations for each multiply-add, whatever operator writes the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.graph.flops import attention_flops, flops, is_flex_attention, is_product
from tests.graph.by_hand import ByHand

aten = torch.ops.aten
Make = Callable[[ByHand], fx.Node]


def made(op: Any, *shapes: tuple[int, ...], after: tuple[Any, ...] = ()) -> Make:
    def make(graph: ByHand) -> fx.Node:
        return graph.call(op, *(graph.input(f"x{i}", *shape) for i, shape in enumerate(shapes)), *after)

    return make


CASES: dict[str, tuple[Make, int]] = {
    "mm": (made(aten.mm.default, (2, 3), (3, 5)), 2 * 2 * 3 * 5),
    "addmm": (made(aten.addmm.default, (5,), (2, 3), (3, 5)), 2 * 2 * 3 * 5),
    "bmm": (made(aten.bmm.default, (7, 2, 3), (7, 3, 5)), 2 * 7 * 2 * 3 * 5),
    "linear": (made(aten.linear.default, (4, 2, 3), (5, 3)), 2 * 4 * 2 * 3 * 5),
    "linear with bias": (made(aten.linear.default, (4, 2, 3), (5, 3), (5,)), 2 * 4 * 2 * 3 * 5),
    "mv": (made(aten.mv.default, (2, 3), (3,)), 2 * 2 * 3),
    "dot": (made(aten.dot.default, (3,), (3,)), 2 * 3),
    "addmv": (made(aten.addmv.default, (2,), (2, 3), (3,)), 2 * 2 * 3),
    "addbmm": (made(aten.addbmm.default, (2, 5), (7, 2, 3), (7, 3, 5)), 2 * 7 * 2 * 3 * 5),
    "convolution": (made(aten.conv2d.default, (1, 3, 8, 8), (4, 3, 3, 3)), 2 * 36 * 4 * 3 * 9),
    "grouped": (made(aten.conv1d.default, (1, 4, 8), (4, 2, 3), after=(None, [1], [0], [1], 2)), 2 * 6 * 4 * 2 * 3),
    "bilinear": (made(aten.bilinear.default, (2, 3), (2, 4), (5, 3, 4)), 2 * 2 * 5 * 3 * 4 + 2 * 2 * 5 * 4),
    "sum": (made(aten.add.Tensor, (2, 3), (2, 3)), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_flops(name: str) -> None:
    make, expected = CASES[name]
    assert flops(make(ByHand())) == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "sum"])
def test_what_multiplies_is_a_product(name: str) -> None:
    assert is_product(CASES[name][0](ByHand()))


def test_what_multiplies_nothing_is_none() -> None:
    graph = ByHand()
    x = graph.input("x", 2, 2)
    assert not is_product(x)
    assert not is_product(graph.call(aten.relu.default, x))
    assert not is_product(graph.call(aten.add.Tensor, x, 1))
    assert not is_flex_attention(graph.call(aten.relu.default, x))


def test_operands_that_autocast_would_cast_to_one_type() -> None:
    """Probabilities of a softmax in float32 times values in bfloat16."""
    graph = ByHand()
    probabilities, values = graph.input("p", 7, 2, 3), graph.input("v", 7, 3, 5)
    product = graph.call(aten.bmm.default, probabilities, values)
    values.meta["val"] = values.meta["val"].to(torch.bfloat16)
    assert flops(product) == 2 * 7 * 2 * 3 * 5


def test_attention() -> None:
    batch, heads, rows, columns, depth, width = 2, 4, 8, 6, 16, 5
    graph = ByHand()
    query = graph.input("q", batch, heads, rows, depth)
    key = graph.input("k", batch, heads, columns, depth)
    value = graph.input("v", batch, heads, columns, width)
    node = graph.call(aten.scaled_dot_product_attention.default, query, key, value)
    scores = math.prod((batch, heads, rows, columns))
    assert attention_flops(node) == (2 * scores * depth, 2 * scores * width)
    by_keyword = graph.call(aten.scaled_dot_product_attention.default, value=value, query=query, key=key)
    assert attention_flops(by_keyword) == attention_flops(node)


def test_a_symbolic_size_counts_as_in_the_example_and_adds_no_guard() -> None:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    x = torch.empty(6, 3)
    torch._dynamo.mark_dynamic(x, 0)
    graph = fx.Graph()
    rows, weight = graph.placeholder("x"), graph.placeholder("w")
    rows.meta["val"], weight.meta["val"] = mode.from_tensor(x), mode.from_tensor(torch.empty(5, 3))
    assert not isinstance(rows.meta["val"].shape[0], int)
    before = len(shapes.guards)
    assert flops(graph.call_function(aten.linear.default, (rows, weight))) == 2 * 6 * 3 * 5
    assert len(shapes.guards) == before
