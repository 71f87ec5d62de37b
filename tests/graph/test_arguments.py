"""Arguments by name: read and set wherever they stand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph.arguments import (
    argument,
    argument_at,
    has_argument,
    in_places,
    name_at,
    named_arguments,
    operand,
    set_argument,
)
from fxquant.ops import fake_quantize, quantize
from tests.graph.written import Op, Written

aten = torch.ops.aten

OPS = [
    *(aten.conv2d.default, aten.conv_transpose2d.input, aten.convolution.default, aten.linear.default),
    *(aten.addmm.default, aten.batch_norm.default, aten.add.Tensor, aten.slice.Tensor, aten.var_mean.correction),
    *(fake_quantize.PER_TENSOR, fake_quantize.PER_CHANNEL, fake_quantize.PER_CHANNEL_BACKWARD),
]
by_op = pytest.mark.parametrize("op", OPS, ids=str)


def from_schema(node: fx.Node) -> dict[str, Any]:
    """What torch itself reads of a node: defaults filled in, all by keyword. It calls ``self`` ``input``."""
    names = {"self": "input"} if any(each.name == "self" for each in node.target._schema.arguments) else {}
    found = fx.operator_schemas.normalize_function(
        node.target,
        node.args,
        {names.get(name, name): value for name, value in node.kwargs.items()},
        normalize_to_only_use_kwargs=True,
    )
    assert found is not None and not found.args
    back = {new: old for old, new in names.items()}
    return {back.get(name, name): value for name, value in found.kwargs.items()}


@by_op
def test_read_alike_however_written(op: Op) -> None:
    written = Written(op)
    for node in (written.in_place(), written.by_keyword()):
        assert {name: argument(node, name) for name in written.given} == written.given
        assert from_schema(node) == written.given
        assert named_arguments(node) == written.given


@by_op
def test_read_by_place_in_the_schema(op: Op) -> None:
    names = [each.name for each in op._schema.arguments]
    for write in ("in_place", "by_keyword", "required"):
        node = getattr(Written(op), write)()
        assert [name_at(node, index) for index in range(len(names))] == names
        assert [argument_at(node, index) for index in range(len(names))] == [argument(node, name) for name in names]


@by_op
def test_what_is_left_out_has_its_default(op: Op) -> None:
    written = Written(op)
    node = written.required()
    assert {name: argument(node, name) for name in written.given} == written.defaults()
    assert named_arguments(node).items() <= written.defaults().items()


@by_op
def test_set_wherever_it_stands(op: Op) -> None:
    for write in ("in_place", "by_keyword", "required"):
        for name in Written(op).given:
            written = Written(op)
            node = getattr(written, write)()
            before = {each: argument(node, each) for each in written.given}
            new = written.graph.placeholder("new")
            set_argument(node, name, new)
            after = {each: argument(node, each) for each in written.given}
            assert after == before | {name: new}
            assert from_schema(node) == after
            assert new in node.all_input_nodes


def test_a_default_that_is_left_out_stays_left_out() -> None:
    written = Written(aten.conv2d.default)
    node = written.required()
    set_argument(node, "bias", None)
    set_argument(node, "groups", 1)
    assert dict(node.kwargs) == {} and len(node.args) == 2
    set_argument(node, "groups", True)  # equal to 1, and another value
    assert dict(node.kwargs) == {"groups": True}


def test_a_default_replaces_what_is_written() -> None:
    for write in ("in_place", "by_keyword"):
        node = getattr(Written(aten.linear.default), write)()
        set_argument(node, "bias", None)
        assert argument(node, "bias") is None
        assert len(node.args) + len(node.kwargs) == 3


def test_keyword_only_arguments_take_no_place() -> None:
    node = Written(fake_quantize.PER_TENSOR).required()
    set_argument(node, "rounding", "divide")
    assert len(node.args) == 5 and dict(node.kwargs) == {"rounding": "divide"}


def test_operand_is_a_node() -> None:
    written = Written(aten.linear.default)
    assert operand(written.by_keyword(), "bias") is written.given["bias"]
    with pytest.raises(AssertionError, match=r"bias of linear.* must be a node: got None"):
        operand(written.required(), "bias")


def test_has_argument() -> None:
    assert has_argument(Written(fake_quantize.PER_CHANNEL).required(), "axis")
    assert not has_argument(Written(fake_quantize.PER_TENSOR).required(), "axis")
    graph = fx.Graph()
    assert not has_argument(graph.placeholder("axis"), "axis")
    assert not has_argument(graph.call_function(operator.add, (1, 2)), "axis")


def test_what_is_no_argument_is_our_bug() -> None:
    node = Written(aten.linear.default).in_place()
    with pytest.raises(AssertionError, match=r"linear.default has no argument 'groups': it has input, weight, bias"):
        argument(node, "groups")
    with pytest.raises(AssertionError, match="has no argument 'groups'"):
        set_argument(node, "groups", 1)


def test_an_operator_without_schema_is_our_bug() -> None:
    node = fx.Graph().call_function(operator.add, (1, 2))
    for read in (lambda: argument(node, "a"), lambda: set_argument(node, "a", 1), lambda: named_arguments(node)):
        with pytest.raises(AssertionError, match="which has no schema"):
            read()


def test_a_missing_operand_is_our_bug() -> None:
    node = fx.Graph().call_function(aten.linear.default, ())
    with pytest.raises(AssertionError, match=r"must have the argument 'weight' of aten.linear.default"):
        argument(node, "weight")


def test_the_number_of_a_dtype_is_no_default() -> None:
    """A schema says 1 for int8, which no reader would know for a dtype."""
    graph = fx.Graph()
    args = tuple(graph.placeholder(name) for name in ("x", "scale", "point"))
    node = graph.call_function(quantize.QUANTIZE_TENSOR, (*args, -128, 127))
    with pytest.raises(AssertionError, match="must have the argument 'dtype'"):
        argument(node, "dtype")
    assert argument(graph.call_function(quantize.QUANTIZE_TENSOR, (*args, 0, 255, torch.uint8)), "dtype") is torch.uint8


def test_keywords_go_into_their_places_as_far_as_none_is_left_out() -> None:
    graph = fx.Graph()
    x, w, b = (graph.placeholder(name) for name in "xwb")
    given = {"weight": w, "bias": b, "padding": [1, 1], "groups": 2}
    node = graph.call_function(aten.conv2d.default, (x,), given)
    assert in_places(node) == ((x, w, b), {"padding": [1, 1], "groups": 2})  # the stride between is not written
    assert in_places(graph.call_function(aten.conv2d.default, (x, w))) == ((x, w), {})
