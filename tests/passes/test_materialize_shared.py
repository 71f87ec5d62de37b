from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops.materialize import MATERIALIZE
from fxquant.passes.materialize_observed import MaterializeObserved
from tests.passes.graphs import apply, untouched


def traced(function: Callable[[Tensor], tuple[Tensor, ...]]) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(torch.randn(4, 8))


def test_a_dear_value_with_a_range_is_stored() -> None:
    gm = traced(lambda x: ((x.erf() * 2).amin(), (x.erf() * 2).round()))
    fx_graph = traced(lambda x: _range_and_codes(x.erf() * 2))
    assert apply(MaterializeObserved(), fx_graph).rewrites == 1
    stored = next(node for node in fx_graph.graph.nodes if node.target is MATERIALIZE)
    assert {user.name for user in stored.users} == {"amin", "amax", "round_1"}
    assert [user.target for user in stored.args[0].users] == [MATERIALIZE]
    untouched(MaterializeObserved(), gm)  # two tensors, each read once


def _range_and_codes(y: Tensor) -> tuple[Tensor, ...]:
    return y.amin(), y.amax(), y.round()


def test_moved_values_count_as_what_they_are() -> None:
    gm = traced(lambda x: _range_and_codes(x.erf().view(8, 4).t()))
    assert apply(MaterializeObserved(), gm).rewrites == 1


def test_cheap_values_are_left() -> None:
    untouched(MaterializeObserved(), traced(lambda x: _range_and_codes(x.relu() * 2 + 1)))


def test_what_a_library_call_has_stored_is_left() -> None:
    untouched(MaterializeObserved(), traced(lambda x: _range_and_codes(x.exp() @ x.t())))


def test_values_without_a_range_are_left() -> None:
    untouched(MaterializeObserved(), traced(lambda x: (x.erf().round(), x.erf() + 1)))
