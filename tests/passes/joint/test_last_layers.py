"""Which gradients come straight from the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.passes.joint.joint import Joint
from fxquant.passes.joint.last_layers import is_of_last_layer

aten = torch.ops.aten
X, V, W, T = torch.ones(4, 8), torch.ones(8, 6), torch.ones(6, 5), torch.ones(4, 5)


def straight(dy: Tensor) -> Tensor:
    return dy


def masked(dy: Tensor) -> Tensor:
    return dy * (dy > 0)


def softmax(dy: Tensor) -> Tensor:
    return aten._log_softmax_backward_data(dy, torch.log_softmax(torch.ones_like(dy), 1), 1, torch.float32)


def step(of_loss: Callable[[Tensor], Tensor], beside: Callable[[Tensor], Tensor] | None = None) -> fx.GraphModule:
    """Two layers' products in backward, the last one's gradient after ``of_loss``, read by ``beside`` too."""

    def run(x: Tensor, v: Tensor, w: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        hidden = x @ v
        dy = of_loss(tangents)
        dh = dy @ w.t()
        more = () if beside is None else (beside(dy),)
        return hidden @ w, hidden.t() @ dy, dy.sum(0), dh, x.t() @ dh, *more

    return make_fx(run, tracing_mode="fake")(X, V, W, T)


def of_products(gm: fx.GraphModule) -> dict[str, bool]:
    """By product of backward: whether its gradient is of the last layer."""
    after = Joint(gm.graph).after_tangents
    products = [n for n in gm.graph.nodes if n.target is aten.mm.default and n in after]
    names = ("dx", "dw", "dv") if len(products) == 3 else ()
    found = {}
    for name, node in zip(names, products, strict=True):
        gradient = next(source for source in node.all_input_nodes if source in after)
        found[name] = is_of_last_layer(gradient, after)
    return found


@pytest.mark.parametrize("of_loss", [straight, masked, softmax], ids=lambda f: f.__name__)
def test_products_of_the_last_layer_alone_have_it(of_loss: Callable[[Tensor], Tensor]) -> None:
    gm = step(of_loss)
    products = of_products(gm)
    assert products.pop("dv") is False, "after the last layer's product"
    assert set(products.values()) == {True}


@pytest.mark.parametrize("beside", [lambda dy: dy + 1, lambda dy: dy.view(20).exp()], ids=["residual", "moved"])
def test_what_a_block_hands_on_is_a_gradient_like_those_before_it(beside: Callable[[Tensor], Tensor]) -> None:
    assert not any(of_products(step(straight, beside)).values())


def test_a_value_of_forward_is_no_gradient() -> None:
    gm = step(straight)
    x, after = next(iter(gm.graph.nodes)), Joint(gm.graph).after_tangents
    assert not is_of_last_layer(x, after)
