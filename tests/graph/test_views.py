"""Typed views read a node alike, however it is written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph import views
from fxquant.graph.views import FakeQuant, FakeQuantBackward, Item, View, qparams_of
from fxquant.ops import fake_quantize, qparams
from fxquant.ops.marks import BIND
from tests.graph.written import Op, Written

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """A view, an operator that it is for, and field → argument, or what the field is for operators without it."""

    view: type[View]
    op: Op
    fields: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.view.__name__}-{self.op}"


@dataclass(frozen=True)
class Always:
    """What a field is, whatever the node says."""

    value: object


SITE = {name: name for name in ("input", "scale", "zero_point", "quant_min", "quant_max", "rounding")}
TENSOR, CHANNEL = {"axis": Always(None)}, {"axis": "axis"}
ELEMENT, TRAINED = {"element": "element"}, {"pass_through": "pass_through", "scale_gradient": "scale_gradient"}
CONV = {name: name for name in ("input", "weight", "bias", "stride", "padding", "dilation", "groups")}
NORM = {
    name: name for name in ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
}

CASES = [
    Case(
        FakeQuant,
        fake_quantize.PER_TENSOR_SCALAR,
        SITE | TENSOR | {"pass_through": Always(False), "element": Always(None), "scale_gradient": Always(0.0)},
    ),
    Case(FakeQuant, fake_quantize.PER_TENSOR, SITE | TENSOR | ELEMENT | TRAINED),
    Case(FakeQuant, fake_quantize.PER_CHANNEL, SITE | CHANNEL | ELEMENT | TRAINED),
    Case(FakeQuantBackward, fake_quantize.PER_TENSOR_BACKWARD, SITE | TENSOR | ELEMENT | {"grad": "grad"}),
    Case(FakeQuantBackward, fake_quantize.PER_CHANNEL_BACKWARD, SITE | CHANNEL | ELEMENT | {"grad": "grad"}),
    Case(
        views.AffineQparams,
        qparams.AFFINE_QPARAMS,
        {name: name for name in ("min", "max", "quant_min", "quant_max", "symmetric")},
    ),
    Case(views.SymmetricQparams, qparams.SYMMETRIC_QPARAMS, {name: name for name in ("input", "axis", "quant_max")}),
    Case(views.BlockQparams, qparams.BLOCK_QPARAMS, {"tensor_amax": "tensor_amax"}),
    Case(
        views.AverageMinMax,
        qparams.AVERAGE_MIN_MAX,
        {"extremes": ("low", "high"), "state": ("min", "max"), "constant": "constant"},
    ),
    Case(views.Bind, BIND, {name: name for name in ("key", "modes", "state", "group", "before")}),
    Case(views.BatchNorm, aten.batch_norm.default, NORM),
    Case(views.Convolution, aten.conv1d.default, CONV | {"transposed": Always(False)}),
    Case(views.Convolution, aten.conv2d.default, CONV | {"transposed": Always(False)}),
    Case(views.Convolution, aten.conv3d.default, CONV | {"transposed": Always(False)}),
    Case(views.Convolution, aten.conv_transpose1d.default, CONV | {"transposed": Always(True)}),
    Case(views.Convolution, aten.conv_transpose2d.input, CONV | {"transposed": Always(True)}),
    Case(views.Convolution, aten.conv_transpose3d.input, CONV | {"transposed": Always(True)}),
    Case(views.Convolution, aten.convolution.default, CONV | {"transposed": "transposed"}),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def expected(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a view where the operator has these arguments."""
    found = {}
    for field, source in case.fields.items():
        if isinstance(source, Always):
            found[field] = source.value
        else:
            found[field] = tuple(given[name] for name in source) if isinstance(source, tuple) else given[source]
    return found


def read(case: Case, node: fx.Node) -> dict[str, Any]:
    view = case.view.of(node)
    assert view is not None and view.node is node
    return {field: getattr(view, field) for field in case.fields}


@by_case
def test_reads_arguments_in_place_and_by_keyword(case: Case) -> None:
    written = Written(case.op)
    assert read(case, written.in_place()) == expected(case, written.given)
    assert read(case, written.by_keyword()) == expected(case, written.given)


@by_case
def test_reads_defaults(case: Case) -> None:
    written = Written(case.op)
    assert read(case, written.required()) == expected(case, written.defaults())


@by_case
def test_every_field_is_tested(case: Case) -> None:
    derived = {"OPS", "PACKETS", "of", "optional", "grid", "has_grid_of", "has_numbers", "node"}
    assert {name for name in dir(case.view) if not name.startswith("_")} - derived == set(case.fields)


def test_every_operator_of_every_view_is_tested() -> None:
    def packets(ops: Any) -> set[Any]:
        return {getattr(op, "overloadpacket", op) for op in ops}

    for view in {case.view for case in CASES}:
        assert packets((*view.OPS, *view.PACKETS)) == packets(case.op for case in CASES if case.view is view)
    classes = {each for each in vars(views).values() if isinstance(each, type) and issubclass(each, View)}
    assert classes == {case.view for case in CASES} | {View, views._Affine, Item}


@by_case
def test_is_of_no_other_operator(case: Case) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    others = (x, graph.call_function(aten.relu.default, (x,)), graph.call_function(operator.add, (x, x)), None, 3, "x")
    assert [case.view.of(other) for other in others] == [None] * len(others)
    for other in {each.op for each in CASES if each.view is not case.view}:
        assert case.view.of(Written(other).in_place()) is None


def test_missing_parts_of_a_batch_norm() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.batch_norm.default, (x, None, None, None, None, False, 0.1, 1e-5, True))
    norm = views.BatchNorm.of(node)
    assert norm is not None and not norm.training
    assert (norm.weight, norm.bias, norm.running_mean, norm.running_var) == (None,) * 4


def test_a_view_reads_what_the_node_has_now() -> None:
    written = Written(fake_quantize.PER_TENSOR)
    site = FakeQuant.of(written.in_place())
    assert site is not None
    other = written.graph.placeholder("other")
    site.node.replace_input_with(written.given["scale"], other)
    assert site.scale is other


def test_grid_is_what_follows_the_input() -> None:
    for op in fake_quantize.FAKE_QUANTIZE:
        written = Written(op)
        node = written.in_place()
        for site in (FakeQuant.of(node), FakeQuant.of(written.by_keyword())):
            assert site is not None and site.grid == node.args[1:]


def test_a_gradient_has_the_grid_of_its_site() -> None:
    pairs = (
        (fake_quantize.PER_TENSOR, fake_quantize.PER_TENSOR_BACKWARD),
        (fake_quantize.PER_CHANNEL, fake_quantize.PER_CHANNEL_BACKWARD),
    )
    for forward, backward in pairs:
        written = Written(forward)
        node = written.by_keyword()
        grad = written.graph.placeholder("grad")
        gradient = written.graph.call_function(backward, (grad, *written.in_place().args), dict(node.kwargs))
        gradient.kwargs = {"rounding": "divide", "element": node.kwargs["element"]}
        site, back = FakeQuant.of(node), FakeQuantBackward.of(gradient)
        assert site is not None and back is not None
        assert back.has_grid_of(site) and back.input is site.input and back.grad is grad
        gradient.update_kwarg("rounding", "reciprocal")
        assert not back.has_grid_of(site)
        gradient.update_kwarg("rounding", "divide")
        gradient.replace_input_with(written.given["scale"], grad)
        assert not back.has_grid_of(site)


def test_only_the_scalar_form_has_numbers() -> None:
    found = {op: FakeQuant.of(Written(op).required()) for op in fake_quantize.FAKE_QUANTIZE}
    assert [op for op, site in found.items() if site is not None and site.has_numbers] == [
        fake_quantize.PER_TENSOR_SCALAR
    ]


def test_qparams_of_a_scale() -> None:
    for op, view in (
        (qparams.AFFINE_QPARAMS, views.AffineQparams),
        (qparams.SYMMETRIC_QPARAMS, views.SymmetricQparams),
    ):
        both = Written(op).by_keyword()
        scale = both.graph.call_function(operator.getitem, (both, 0))
        assert qparams_of(scale) == view(both)
        item = Item.of(scale)
        assert item is not None and item.source is both and item.index == 0


def test_no_qparams_of_other_values() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(aten.var_mean.correction, (x,))
    item = graph.call_function(operator.getitem, (pair, 0))
    assert [qparams_of(value) for value in (x, pair, item, 0.5, None)] == [None] * 5
