"""Sizes and prices of nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.graph.elementwise import elements, is_heavy, is_pointwise, is_small

aten = torch.ops.aten


def node_of(value: Any, op: Any = aten.relu.default) -> fx.Node:
    graph = fx.Graph()
    node = graph.call_function(op, (graph.placeholder("x"),))
    node.meta["val"] = value
    return node


def symbolic(rows: int, columns: int) -> torch.Tensor:
    """[s0, columns] in fake tensors."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = torch.empty(rows, columns)
    torch._dynamo.mark_dynamic(x, 0)
    return mode.from_tensor(x)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)], ids=str)
def test_elements(shape: tuple[int, ...]) -> None:
    assert elements(node_of(torch.empty(shape))) == math.prod(shape)


def test_several_tensors_have_no_number_of_elements() -> None:
    assert elements(node_of((torch.empty(2), torch.empty(2)))) is None
    assert elements(node_of(None)) is None


def test_symbolic_rows_count_alike_whatever_their_number() -> None:
    few, many = symbolic(5, 3), symbolic(50_000, 3)
    assert not isinstance(few.shape[0], int)
    assert elements(node_of(few)) == elements(node_of(many))
    assert elements(node_of(torch.cat([few, few]))) == 2 * (elements(node_of(few)) or 0)


@pytest.mark.parametrize(("source", "node", "small"), [(1, 16, True), (1, 15, False), (4, 64, True), (64, 4, False)])
def test_small_is_a_sixteenth(source: int, node: int, small: bool) -> None:
    assert is_small(node_of(torch.empty(source)), node_of(torch.empty(node))) == small


def test_what_has_no_size_is_not_small() -> None:
    assert not is_small(node_of(None), node_of(torch.empty(64)))
    assert not is_small(node_of(torch.empty(1)), node_of(None))


@pytest.mark.parametrize(
    ("op", "pointwise", "heavy"),
    [
        (aten.relu.default, True, False),
        (aten.add.Tensor, True, False),
        (aten.exp.default, True, True),
        (aten.gelu.default, True, True),
        (aten.pow.Tensor_Scalar, True, True),
        (aten.mm.default, False, False),
        (aten.view.default, False, False),
        (aten._softmax.default, False, False),
    ],
    ids=str,
)
def test_pointwise_and_heavy(op: Any, pointwise: bool, heavy: bool) -> None:
    node = node_of(None, op)
    assert is_pointwise(node) == pointwise
    assert is_heavy(node) == heavy


def test_inputs_compute_nothing() -> None:
    x = fx.Graph().placeholder("exp")
    assert not is_pointwise(x) and not is_heavy(x)
