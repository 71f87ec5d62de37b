from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxquant.graph.bodies import all_graphs
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from tests.passes.graphs import apply, captured, show, untouched

PASS = FunctionalizeActivations()
X = torch.randn(2, 3)


def test_a_chain_of_in_place_ops() -> None:
    def model(x: Tensor) -> Tensor:
        h = torch.sin(x)
        h += x
        early = h * 2
        h.relu_()
        return h + early

    gm = captured(model, X)
    assert apply(PASS, gm).rewrites == 2
    assert_expected_inline(
        show(gm),
        """\
sin = sin(arg0_1)
add_ = add(sin, arg0_1)
mul = mul(add_, 2)
relu_ = relu(add_)
add = add(relu_, mul)
return [add]
""",
    )
    assert torch.equal(gm(X)[0], model(X))


def test_batch_norm_counters_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    gm = captured(model, X)
    assert untouched(PASS, gm).declines == [] and "add_" in gm.code


def test_values_with_views_are_declined() -> None:
    def before(x: Tensor) -> Tensor:
        h = torch.sin(x)
        v = h[0]
        h.relu_()
        return h + v

    def of_view(x: Tensor) -> Tensor:
        h = torch.sin(x)
        h.view(-1).relu_()
        return h * 2

    def of_part(x: Tensor) -> Tensor:
        a, b = torch.sin(x).chunk(2)
        a.relu_()
        return a + b

    for model in (before, of_view, of_part):
        gm = captured(model, X)
        (decline,) = untouched(PASS, gm).declines
        assert decline.reason.endswith("which it changes in place, shares memory with other values")
        assert decline.node == "relu_" and torch.equal(gm(X)[0], model(X))


def test_views_made_afterwards_and_pools_do_not_hinder() -> None:
    def model(x: Tensor) -> Tensor:
        return F.relu(F.max_pool1d(x, 2), inplace=True).flatten() * 2

    gm = captured(model, torch.randn(1, 2, 6))
    assert apply(PASS, gm).rewrites == 1 and "aten.relu.default" in gm.code


def test_inputs_are_left() -> None:
    gm = captured(lambda x: x.relu_() + 1, X.clone())
    assert untouched(PASS, gm).declines == []


def test_checkpointed_bodies() -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    gm = captured(lambda x: checkpoint(layer, x, use_reentrant=False), X.clone().requires_grad_())
    assert apply(PASS, gm).rewrites == 1
    assert not any("relu_.default" in str(n.target) for g in all_graphs(gm) for n in g.graph.nodes)
