from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.graph.meta import mark_masked_gradient
from fxquant.ops.marks import MATERIALIZE
from fxquant.passes.post_grad.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.post_grad.materialize_shared import MaterializeShared
from tests.passes.graphs import apply, untouched


def traced(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor | None = None) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(torch.randn(4, 8) if x is None else x)


def test_a_dear_value_with_a_range_is_stored() -> None:
    gm = traced(lambda x: ((x.erf() * 2).amin(), (x.erf() * 2).round()))
    fx_graph = traced(lambda x: _range_and_codes(x.erf() * 2))
    assert apply(MaterializeShared(), fx_graph).rewrites == 1
    stored = next(node for node in fx_graph.graph.nodes if node.target is MATERIALIZE)
    assert {user.name for user in stored.users} == {"amin", "amax", "round_1"}
    assert [user.target for user in stored.args[0].users] == [MATERIALIZE]
    untouched(MaterializeShared(), gm)  # two tensors, each read once


def _range_and_codes(y: Tensor) -> tuple[Tensor, ...]:
    return y.amin(), y.amax(), y.round()


def test_extremes_of_a_cheap_value_read_what_it_is_computed_from() -> None:
    """So they join the loop that stores it."""
    gm = traced(lambda x: _range_and_codes(x + x.flip(0)))
    assert apply(MaterializeShared(), gm).rewrites == 1
    (stored,) = (node for node in gm.graph.nodes if node.target is MATERIALIZE)
    assert {user.name for user in stored.users} == {"round_1"}
    assert {user.name for user in stored.args[0].users} == {"amin", "amax", stored.name}
    assert stored.args[1] == 0


def test_moved_values_count_as_what_they_are() -> None:
    gm = traced(lambda x: _range_and_codes(x.erf().view(8, 4).t()))
    assert apply(MaterializeShared(), gm).rewrites == 1


def test_cheap_values_are_left() -> None:
    untouched(MaterializeShared(), traced(lambda x: _range_and_codes(x.relu() * 2 + 1)))


def test_what_a_library_call_has_stored_is_left() -> None:
    untouched(MaterializeShared(), traced(lambda x: _range_and_codes(x.exp() @ x.t())))


def test_values_without_a_range_are_left() -> None:
    untouched(MaterializeShared(), traced(lambda x: (x.erf().round(), x.erf() + 1)))


def _stored(gm: fx.GraphModule) -> list[str]:
    apply(MaterializeShared(), gm)
    return [str(node.args[0]) for node in gm.graph.nodes if node.target is MATERIALIZE]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_residual_sum_that_is_normalized_is_stored(norm: str) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        total = x + x.flip(0)
        if norm == "layer_norm":
            variance, mean = torch.var_mean(total, [1], keepdim=True, correction=0)
            return ((total - mean) * (variance + 1e-5).rsqrt(),)
        return (total * (total.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(),)

    gm = traced(model, torch.randn(64, 64))
    assert _stored(gm) == ["add"]
    assert [node.args[1] for node in gm.graph.nodes if node.target is MATERIALIZE] == [1]  # row by row


@pytest.mark.parametrize(("dims", "rows"), [([2], 2), ([-1, 1], 1), ([0, 2], 0), ([0, 1, 2], 0)], ids=str)
def test_a_sum_is_stored_in_the_rows_of_its_normalization(dims: list[int], rows: int) -> None:
    gm = traced(lambda x: torch.var_mean(x + x.flip(0), dims, keepdim=True), torch.randn(8, 16, 32))
    gm.graph.eliminate_dead_code()
    total = next(node for node in gm.graph.nodes if node.name == "add")
    with gm.graph.inserting_before(gm.graph.output_node()):  # a second reader
        gm.graph.output_node().args = ((gm.graph.output_node().args[0], total),)
    gm.recompile()
    assert _stored(gm) == ["add"]
    assert [node.args[1] for node in gm.graph.nodes if node.target is MATERIALIZE] == [rows]


def test_other_sums_are_left() -> None:
    x = torch.randn(64, 64)
    untouched(MaterializeShared(), traced(lambda x: ((x + x.flip(0)) * 2, (x + x.flip(0)).sum()), x))  # no mean
    untouched(MaterializeShared(), traced(lambda x: torch.var_mean(x + 1.0, [1]), x))  # no two tensors
    untouched(MaterializeShared(), traced(lambda x: torch.var_mean(x + x[0], [1]), x))  # one of them small
    untouched(MaterializeShared(), traced(lambda x: torch.var_mean(x + x.flip(0), [1])))  # both small


def test_a_masked_gradient_that_several_read_is_stored() -> None:
    gm = traced(lambda x: (lambda g: (g.sum(), g * 2))(x * x.sign()))
    (product,) = (node for node in gm.graph.nodes if node.name == "mul")
    untouched(MaterializeShared(), gm)
    mark_masked_gradient(product)
    assert _stored(gm) == ["mul"]


def test_the_lowering_of_a_gradient_marks_it() -> None:
    def model(g: Tensor, x: Tensor, scale: Tensor, point: Tensor) -> tuple[Tensor, ...]:
        masked = torch.ops.fxquant.fake_quantize_per_tensor_affine_backward(g, x, scale, point, 0, 255)
        return masked.sum(0), masked * 2

    qparams = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    gm = make_fx(model, tracing_mode="fake")(torch.randn(4, 8), torch.randn(4, 8), *qparams)
    apply(LowerFakeQuantize(), gm)
    (stored,) = _stored(gm)
    assert stored.startswith("mul")
