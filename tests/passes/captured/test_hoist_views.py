from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from fxquant.ops import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from fxquant.passes.captured.hoist_views import HoistViews
from tests.passes.graphs import apply, captured, evaluate, quantizing, show, untouched

PASS = HoistViews()
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
SCALE, POINT = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)


def quantize(x: Tensor, scale: Tensor = SCALE, point: Tensor = POINT) -> Tensor:
    return fake_quantize_per_tensor_affine(x, scale, point, 0, 15, rounding="divide")


def test_snapshot() -> None:
    def model(x: Tensor) -> Tensor:
        return fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15).transpose(1, 2).reshape(8, 3) @ x.view(3, 8)

    gm = captured(model, X)
    before = show(gm)
    assert apply(PASS, gm).rewrites == 2
    assert_expected_inline(
        before + "\n" + show(gm),
        """\
fake_quantize_per_tensor_affine = fake_quantize_per_tensor(arg0_1, 0.1, 3, 0, 15)
transpose = transpose(fake_quantize_per_tensor_affine, 1, 2)
reshape = reshape(transpose, [8, 3])
view = view(arg0_1, [3, 8])
matmul = matmul(reshape, view)
return [matmul]

transpose_int = transpose(arg0_1, 1, 2)
reshape_default = reshape(transpose_int, [8, 3])
fake_quantize_per_tensor_affine = fake_quantize_per_tensor(reshape_default, 0.1, 3, 0, 15)
view = view(arg0_1, [3, 8])
matmul = matmul(fake_quantize_per_tensor_affine, view)
return [matmul]
""",
    )


@dataclass(frozen=True)
class View:
    name: str
    function: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


VIEWS = (
    View("permute", lambda y: y.permute(2, 0, 1)),
    View("t", lambda y: y[0].t()),
    View("unsqueeze, squeeze", lambda y: y.unsqueeze(1).squeeze(1)),
    View("view", lambda y: y.view(2, 12) if y.is_contiguous() else y.view(2, 3, 2, 2)),
    View("flatten, unflatten", lambda y: y.flatten(1).unflatten(1, (2, 6))),
    View("a view of what is no longer whole", lambda y: y.transpose(0, 1).reshape(-1)),
)


@pytest.mark.parametrize("layout", ["whole", "strided"])
def test_values_and_gradients_stay_the_same(layout: str) -> None:
    """Of each view, in one graph."""

    def model(xs: list[Tensor]) -> list[Tensor]:
        return [view.function(quantize(x.sin())).cos() for view, x in zip(VIEWS, xs, strict=True)]

    x = (X if layout == "whole" else torch.randn(4, 3, 2).permute(2, 1, 0)).clone(memory_format=torch.preserve_format)
    results = []
    for passes in ((), (PASS,)):
        torch._dynamo.reset()
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in VIEWS]
        ys = torch.compile(model, backend=quantizing(*passes))(leaves)
        torch.autograd.backward([y.sum() for y in ys])
        results.append(([y.detach() for y in ys], [leaf.grad for leaf in leaves]))
    (plain, plain_grads), (found, grads) = results
    for view, y, own, grad, own_grad in zip(VIEWS, plain, found, plain_grads, grads, strict=True):
        assert torch.equal(y, own) and torch.equal(grad, own_grad), view  # type: ignore[arg-type]


def test_the_view_of_values_with_other_strides() -> None:
    """Every second column: after the fake-quant it is whole, before it no view of it is two-dimensional."""

    def model(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return quantize(x[..., ::2], s, z).view(2, 12) * 2

    args = torch.randn(2, 3, 8), SCALE, POINT
    gm = captured(model, *args)
    expected = evaluate(gm, model, *args)
    assert apply(PASS, gm).rewrites == 1
    assert torch.equal(evaluate(gm, model, *args), expected)


def test_what_is_read_in_its_own_shape_too_is_left() -> None:
    untouched(PASS, captured(lambda x: (lambda y: y.view(6, 4).sum() + y.sum())(quantize(x)), X))


def test_a_scale_per_channel_is_left() -> None:
    scales, points = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int32)
    gm = captured(lambda x: fake_quantize_per_channel_affine(x, scales, points, 1, -8, 7).view(2, 12) * 2, X)
    untouched(PASS, gm)


def test_copies_and_enlargements_are_left() -> None:
    untouched(PASS, captured(lambda x: quantize(x).expand(5, 2, 3, 4) * 2, X))
    untouched(PASS, captured(lambda x: F.pad(quantize(x), (1, 1)), X))


def test_what_is_changed_in_place_later_is_quantized_before() -> None:
    def model(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        copy = x.clone()
        y = quantize(copy, s, z)
        copy.add_(1)
        return y.view(6, 4) * copy.view(6, 4)

    gm = captured(model, X, SCALE, POINT)
    expected = evaluate(gm, model, X, SCALE, POINT)
    PASS.run(gm)
    assert torch.equal(evaluate(gm, model, X, SCALE, POINT), expected)


def test_a_size_that_is_computed_later_is_waited_for() -> None:
    gm = captured(lambda x, s, z: quantize(x, s, z) * 1, X, SCALE, POINT)
    (quantized,) = (node for node in gm.graph.nodes if "fake_quantize" in node.name)
    product = quantized.next
    with gm.graph.inserting_after(quantized):
        size = gm.graph.call_function(torch.ops.aten.sym_size.int, (quantized.args[0], 0))
    size.meta["val"] = 2
    with gm.graph.inserting_after(size):
        view = gm.graph.call_function(torch.ops.aten.view.default, (quantized, [size, 12]))
    view.meta["val"] = quantized.meta["val"].view(2, 12)
    product.args = (view, 1)
    untouched(PASS, gm)
