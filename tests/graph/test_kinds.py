"""Operator kinds: which operands an operator has, read and replaced however the node is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph.kinds import (
    KINDS,
    activation_name,
    bias_of,
    kind_of,
    operands,
    replace_operand,
    set_bias,
    unit_end,
)
from fxquant.graph.nodes import packet
from tests.graph.by_hand import ByHand
from tests.graph.written import Op, Written

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """An operator, its kind, and operand → the argument of the schema."""

    op: Op
    kind: str
    operands: dict[str, str]

    def __str__(self) -> str:
        return str(self.op)


CONV = {"input": "input", "weight": "weight"}
CASES = [
    *(Case(op, "conv", CONV) for op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)),
    Case(aten.convolution.default, "conv_transpose", CONV),  # every bool that `Written` gives is True
    Case(aten.conv_transpose2d.input, "conv_transpose", CONV),
    Case(aten.linear.default, "linear", CONV),
    Case(aten.addmm.default, "linear", {"input": "mat1", "weight": "mat2"}),
    Case(aten.matmul.default, "matmul", {"lhs": "self", "rhs": "other"}),
    Case(aten.mm.default, "matmul", {"lhs": "self", "rhs": "mat2"}),
    Case(aten.bmm.default, "matmul", {"lhs": "self", "rhs": "mat2"}),
    Case(aten.baddbmm.default, "matmul", {"lhs": "batch1", "rhs": "batch2"}),
    Case(aten.mv.default, "mv", {"lhs": "self", "rhs": "vec"}),
    Case(aten.addmv.default, "mv", {"lhs": "mat", "rhs": "vec"}),
    Case(aten.embedding.default, "embedding", {"weight": "weight"}),
    Case(aten.scaled_dot_product_attention.default, "sdpa", {"query": "query", "key": "key", "value": "value"}),
    Case(aten.add.Tensor, "add", {"lhs": "self", "rhs": "other"}),
    Case(aten.avg_pool2d.default, "avg_pool", {"input": "self"}),
    Case(aten.adaptive_avg_pool2d.default, "avg_pool", {"input": "self"}),
    Case(aten.bilinear.default, "bilinear", {}),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
WAYS = ("in_place", "by_keyword")


@by_case
def test_operands_however_written(case: Case) -> None:
    written = Written(case.op)
    for way in WAYS:
        node = getattr(written, way)()
        kind = kind_of(node)
        assert kind is not None and kind.name == case.kind
        assert operands(node) == {name: written.given[argument] for name, argument in case.operands.items()}


@by_case
def test_replaces_one_operand(case: Case) -> None:
    for way in WAYS:
        for name in case.operands:
            written = Written(case.op)
            node = getattr(written, way)()
            before, arguments = operands(node), (len(node.args), set(node.kwargs))
            new = written.graph.placeholder("new")
            replace_operand(node, name, new)
            assert operands(node) == before | {name: new}
            assert (len(node.args), set(node.kwargs)) == arguments


def test_the_same_tensor_in_another_operand_stays() -> None:
    graph = ByHand()
    x, new = graph.input("x", 2, 2), graph.input("new", 2, 2)
    node = graph.call(aten.mm.default, x, x)
    replace_operand(node, "rhs", new)
    assert operands(node) == {"lhs": x, "rhs": new}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", [aten.cat.default, aten.einsum.default], ids=str)
def test_lists_of_operands(op: Op, way: str) -> None:
    written = Written(op)
    node, listed = getattr(written, way)(), written.given["tensors"]
    assert operands(node) == {"operand0": listed[0], "operand1": listed[1]}
    new = written.graph.placeholder("new")
    replace_operand(node, "operand1", new)
    assert operands(node) == {"operand0": listed[0], "operand1": new}


@pytest.mark.parametrize(("transposed", "kind"), [(False, "conv"), (True, "conv_transpose")])
def test_convolution_says_what_it_is(transposed: bool, kind: str) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    rest = {"bias": None, "stride": [1], "padding": [0], "dilation": [1], "output_padding": [0], "groups": 1}
    node = graph.call_function(aten.convolution.default, (x, w), rest | {"transposed": transposed})
    found = kind_of(node)
    assert found is not None and found.name == kind


def test_a_sum_with_a_number_is_no_add() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert kind_of(graph.call_function(aten.add.Tensor, (x, 1))) is None
    assert kind_of(graph.call_function(aten.add.Scalar, (x, 1))) is None
    assert operands(graph.call_function(aten.add.Tensor, (x,), {"other": 1})) == {}


def test_what_is_no_operator_has_no_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("conv2d")
    assert kind_of(x) is None and operands(x) == {}
    relu = graph.call_function(aten.relu.default, (x,))
    assert kind_of(relu) is None and operands(relu) == {}


def test_every_weight_is_an_operand() -> None:
    for op, kind in KINDS.items():
        assert kind.weight is None or kind.weight in kind.operands, op


def activation(op: Op, *args: Any, **kwargs: Any) -> str | None:
    graph = fx.Graph()
    return activation_name(graph.call_function(op, (graph.placeholder("x"), *args), kwargs))


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "expected"),
    [
        (aten.relu.default, (), {}, "relu"),
        (aten.clamp_min.default, (0,), {}, "relu"),
        (aten.clamp_min.default, (), {"min": 0.0}, "relu"),
        (aten.clamp.default, (0,), {}, "relu"),
        (aten.clamp.default, (0.0, None), {}, "relu"),
        (aten.clamp.default, (), {"min": 0}, "relu"),
        (aten.relu6.default, (), {}, "relu6"),
        (aten.hardtanh.default, (0, 6), {}, "relu6"),
        (aten.hardtanh.default, (0.0,), {"max_val": 6.0}, "relu6"),
        (aten.clamp.default, (0, 6), {}, "relu6"),
        (aten.hardtanh.default, (), {}, None),
        (aten.hardtanh.default, (0,), {}, None),
        (aten.clamp.default, (0, 1), {}, None),
        (aten.clamp.default, (None, 0), {}, None),
        (aten.clamp_min.default, (1,), {}, None),
        (aten.gelu.default, (), {}, None),
    ],
)
def test_activations(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], expected: str | None) -> None:
    assert activation(op, *args, **kwargs) == expected


def test_a_bound_in_a_tensor_is_no_known_activation() -> None:
    graph = fx.Graph()
    x, low = graph.placeholder("x"), graph.placeholder("low")
    assert activation_name(graph.call_function(aten.clamp.Tensor, (x, low))) is None
    assert activation_name(graph.call_function(aten.clamp_min.Tensor, (x, low))) is None
    assert activation_name(x) is None


class Unit:
    """``relu(batch_norm(conv(x, w)))``."""

    def __init__(self, norm_by_keyword: bool = False) -> None:
        self.graph = ByHand()
        x, w = self.graph.input("x", 1, 3, 5, 5), self.graph.input("w", 3, 3, 1, 1, state=True)
        mean, var = self.graph.input("mean", 3, state=True), self.graph.input("var", 3, state=True)
        self.conv = self.graph.call(aten.conv2d.default, x, w)
        rest = (None, None, mean, var, False, 0.1, 1e-5, False)
        names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
        if norm_by_keyword:
            named = dict(zip(names, rest, strict=True))
            self.norm = self.graph.call(aten.batch_norm.default, input=self.conv, **named)
        else:
            self.norm = self.graph.call(aten.batch_norm.default, self.conv, *rest)
        self.relu = self.graph.call(aten.relu.default, self.norm)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_unit_ends_after_norm_and_activation(by_keyword: bool) -> None:
    unit = Unit(by_keyword)
    assert unit_end(unit.conv, frozenset({"relu"})) is unit.relu
    assert unit_end(unit.conv, frozenset({"relu6"})) is unit.norm
    assert unit_end(unit.norm, frozenset({"relu"})) is unit.relu


def test_unit_ends_where_something_else_reads() -> None:
    unit = Unit()
    unit.graph.call(aten.neg.default, unit.norm)
    assert unit_end(unit.conv, frozenset({"relu"})) is unit.norm
    unit.graph.call(aten.neg.default, unit.conv)
    assert unit_end(unit.conv, frozenset({"relu"})) is unit.conv


def test_a_norm_that_reads_it_as_statistics_is_not_of_the_unit() -> None:
    graph = ByHand()
    x, mean = graph.input("x", 2, 3), graph.input("mean", 3)
    doubled = graph.call(aten.mul.Tensor, mean, 2)
    graph.call(aten.batch_norm.default, x, None, None, doubled, mean, False, 0.1, 1e-5, False)
    assert unit_end(doubled, frozenset()) is doubled


@pytest.mark.parametrize("op", [aten.conv2d.default, aten.linear.default, aten.convolution.default], ids=str)
def test_bias_however_written(op: Op) -> None:
    for way in WAYS:
        written = Written(op)
        node = getattr(written, way)()
        assert bias_of(node) is written.given["bias"]
        new = written.graph.placeholder("new")
        set_bias(node, new)
        assert bias_of(node) is new
        set_bias(node, None)
        assert bias_of(node) is None
        assert new not in node.all_input_nodes


def test_a_bias_for_an_operator_without() -> None:
    written = Written(aten.linear.default)
    node = written.required()
    assert bias_of(node) is None
    set_bias(node, None)
    assert len(node.args) == 2 and not node.kwargs
    new = written.graph.placeholder("new")
    set_bias(node, new)
    assert bias_of(node) is new and packet(node) is aten.linear
