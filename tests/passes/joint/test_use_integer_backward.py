from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops import (
    dequantize_per_tensor,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    quantize_per_tensor,
)
from fxquant.ops.integer_matmul import LONGEST_SUM, multiplies_exactly
from fxquant.ops.rounding_words import ROUNDING_WORDS
from fxquant.passes.base import PassResult
from fxquant.passes.joint import use_integer_backward
from fxquant.passes.joint.kept_times import instructions
from fxquant.passes.joint.product_times import Problem, Times
from fxquant.passes.joint.use_integer_backward import IntegerBackward, UseIntegerBackward
from tests.passes.graphs import apply, untouched

aten = torch.ops.aten
NEAREST = UseIntegerBackward(options=IntegerBackward(mode=True, rounding="nearest"))
BY_CHANCE = UseIntegerBackward(options=IntegerBackward(mode=True))

pytestmark = pytest.mark.skipif(
    bool(multiplies_exactly("matmul", "cpu", False)), reason="this machine has no exact integer product"
)


def u8(x: Tensor, point: int = 113) -> Tensor:
    zero = torch.full((1,), point, dtype=torch.int32)
    return fake_quantize_per_tensor_affine(x, torch.full((1,), 0.03), zero, 0, 255, rounding="divide")


def s8(w: Tensor, axis: int = 0) -> Tensor:
    scale = w.abs().amax(1 - axis) / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return fake_quantize_per_channel_affine(w, scale, zero, axis, -127, 127, rounding="divide")


def saved(x: Tensor, low: int = 0, high: int = 255, dtype: torch.dtype = torch.uint8) -> Tensor:
    """As codes that are dequantized for backward."""
    scale, zero = torch.full((1,), 0.03), torch.full((1,), 113, dtype=torch.int32)
    return dequantize_per_tensor(quantize_per_tensor(x, scale, zero, low, high, dtype), scale, zero)


def traced(model: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """All products count as those of backward."""
    gm = make_fx(model, tracing_mode="fake")(*args)
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_backward"
    return gm


def counts(gm: fx.GraphModule) -> tuple[int, int, int]:
    """How many products are float, of integers, and how many draw words."""
    targets = [node.target for node in gm.graph.nodes]
    integers = targets.count(aten._int_mm.default)
    return targets.count(aten.mm.default), integers, targets.count(ROUNDING_WORDS)


def reasons(result: PassResult) -> list[str]:
    return [each.reason.removeprefix("float product in backward: ") for each in result.declines]


DY, X, W = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((48, 6), (48, 10), (6, 10)))

Multiply = Callable[[Tensor, Tensor], Tensor]
SIGNED = functools.partial(saved, low=-128, high=127, dtype=torch.int8)
PRODUCTS: dict[str, tuple[Multiply, Callable[[Tensor], Tensor], Tensor]] = {
    "dx": (lambda dy, w: dy @ w, s8, W),
    "dx, weight turned twice": (lambda dy, w: dy @ w.t().t(), s8, W),
    "dx, one scale a column": (lambda dy, w: dy @ w, functools.partial(s8, axis=1), W),
    "dw": (lambda dy, x: dy.t() @ x, u8, X),
    "dw of saved codes": (lambda dy, x: dy.t() @ x, saved, X),
    "dw, turned": (lambda dy, x: x.t() @ dy, u8, X),
    "dw, turned, of saved codes": (lambda dy, x: x.t() @ dy, saved, X),
    "dw of signed codes": (lambda dy, x: dy.t() @ x, SIGNED, X / 4),
    "a gradient in columns": (lambda dy, x: dy.transpose(-1, 0) @ x, u8, X),
    "a gradient that is no transpose": (lambda dy, x: dy.t().contiguous() @ x, u8, X),
    "a weight on the left": (lambda dy, w: w.t() @ dy.permute(1, -2), s8, W),
}


def graph_of(name: str, dy: Tensor = DY) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """The graph of a product, its second operand, and what it gives in float64 of the quantized values."""
    multiply, quantize, operand = PRODUCTS[name]
    gm = traced(lambda dy, v: multiply(dy, quantize(v).to(dy.dtype)), dy, operand)
    return gm, operand, multiply(dy.double(), quantize(operand).double())


def alike(found: Tensor, exact: Tensor) -> float:
    return torch.cosine_similarity(found.flatten().double(), exact.flatten(), 0).item()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_codes(name: str) -> None:
    """Near to float64's, and no nearer than codes of 8 bits are; the graph has no float product left."""
    gm, operand, exact = graph_of(name)
    assert apply(NEAREST, gm).declines == []
    assert counts(gm) == (0, 1, 0)
    assert not any("dequantize" in str(n.target) or "fake_quantize" in str(n.target) for n in gm.graph.nodes)
    found = gm(DY, operand)
    assert found.shape == exact.shape and found.is_contiguous()
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.01
    assert alike(found, exact) > 0.9999


def test_both_gradients_of_a_layer() -> None:
    """What backward goes on with is rounded to the nearest, what goes out of the graph by chance."""

    def backward(dy: Tensor, x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dh = dy @ w
        return dy.t() @ x, dh.t() @ v, dh.sum(0)

    gm = traced(lambda dy, x, w, v: backward(dy, u8(x), s8(w), u8(v)), DY, X, W, X)
    apply(BY_CHANCE, gm)
    assert counts(gm) == (0, 3, 2)
    assert [n.args for n in gm.graph.find_nodes(op="call_function", target=ROUNDING_WORDS)] == [(48 + 6,), (48 + 10,)]
    torch.manual_seed(0)
    first, second = gm(DY, X, W, X), gm(DY, X, W, X)
    torch.manual_seed(0)
    again = gm(DY, X, W, X)
    assert all(torch.equal(*both) for both in zip(first, again, strict=True)), "one seed, the same bits"
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2]), "the gradient that backward goes on with draws nothing"
    exact = backward(DY.double(), u8(X).double(), s8(W).double(), u8(X).double())
    assert all(alike(*both) > 0.999 for both in zip(first, exact, strict=True))


@pytest.mark.parametrize("name", PRODUCTS)
def test_outliers_stay_float(name: str) -> None:
    """One token, or for dx one channel, a thousand times as large: all others are rounded as without it."""
    gm, operand, _ = graph_of(name)
    outliers = UseIntegerBackward(options=IntegerBackward(mode=True, rounding="nearest", outliers=0.02))
    assert apply(outliers, gm).declines == []
    assert counts(gm) == (1, 1, 0), "a product of the few, and one of codes"
    multiply, quantize, _ = PRODUCTS[name]
    which = (slice(None), 3) if operand is W else 7  # a channel, whose weights are summed over, or a token
    small = DY.clone()
    small[which] = 0
    gradient = small.clone()
    gradient[which] = 1000 * DY[which]
    exact, rest = (multiply(each.double(), quantize(operand).double()) for each in (gradient, small))
    plain, _, _ = graph_of(name)
    apply(NEAREST, plain)
    apart, together = ((each(gradient, operand) - exact).norm() / rest.norm() for each in (gm, plain))
    assert apart < 0.01 < 0.05 < together


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_outlier_that_is_not_finite_stays_so(value: float) -> None:
    gm, operand, _ = graph_of("dw")
    apply(UseIntegerBackward(options=IntegerBackward(mode=True, outliers=0.02)), gm)
    gradient = DY.clone()
    gradient[7, 2] = value
    found = gm(gradient, operand)
    assert not found[2].isfinite().any() and found[:2].isfinite().all() and found[3:].isfinite().all()


def test_bfloat16() -> None:
    low = DY.bfloat16()
    gm, operand, exact = graph_of("dw", low)
    apply(NEAREST, gm)
    assert counts(gm) == (0, 1, 0)
    found = gm(low, operand)
    assert found.dtype == torch.bfloat16 and alike(found, exact) > 0.9999


def test_codes_that_were_packed() -> None:
    def backward(dy: Tensor, x: Tensor) -> Tensor:
        scale, zero = torch.full((1,), 0.4), torch.full((1,), 7, dtype=torch.int32)
        codes = quantize_per_tensor(x, scale, zero, 0, 15, torch.uint8)
        packed = torch.ops.fxquant.pack_planes(codes, 4, 0)
        code = torch.ops.aten.add.Scalar(torch.ops.fxquant.unpack_planes(packed, 4, 0), 0)
        return dy.t() @ dequantize_per_tensor(code, scale, zero)

    gm = traced(backward, DY, X)
    assert apply(NEAREST, gm).declines == []
    assert counts(gm) == (0, 1, 0)
    exact = backward(DY, X).double()
    assert torch.cosine_similarity(gm(DY, X).flatten().double(), exact.flatten(), 0) > 0.9999


def wide(dy: Tensor, x: Tensor) -> Tensor:
    return dy.t() @ saved(x, -1000, 1000, torch.int16)


def convolution(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    w = torch.zeros(6, 10, 1)
    arguments = ([0], [1], [0], [1], False, [0], 1, [False, True, False])
    return aten.convolution_backward(dy.t()[None], u8(x).t()[None], w, *arguments)


REASONS: dict[str, tuple[Callable[..., Any], str]] = {
    "two batches": (
        lambda dy, x: torch.bmm(dy.t()[None], u8(x)[None]),
        "torch has no product of batches of integer matrices",
    ),
    "a sum": (lambda dy, x: torch.addmm(x[0], dy.t(), u8(x)), "a matrix is added to it"),
    "no gradient": (lambda dy, x: u8(dy).t() @ u8(x), "neither operand is a gradient"),
    "double": (lambda dy, x: dy.double().t() @ u8(x.double()), "fake_quantize_per_tensor_affine is float64"),
    "sixteen bits": (wide, "the codes of dequantize_per_tensor have more than 8 bits"),
    "a convolution": (convolution, "torch has no gradient of an integer convolution"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_float(name: str) -> None:
    model, reason = REASONS[name]
    gm = traced(model, DY, X)
    assert reasons(untouched(BY_CHANCE, gm)) == [reason]


def test_long_sums_stay_float() -> None:
    rows = LONGEST_SUM + 1
    gm = traced(lambda dy, x: dy.t() @ u8(x), torch.zeros(rows, 2), torch.zeros(rows, 2))
    assert reasons(untouched(NEAREST, gm)) == [f"its sums of {rows} products may not fit int32"]


def test_a_symbolic_batch_keeps_what_sums_over_it_in_float() -> None:
    gm = make_fx(lambda dy, x: (dy @ s8(torch.full((6, 10), 0.3)), dy.t() @ u8(x)), tracing_mode="symbolic")(DY, X)
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_backward"
    assert reasons(apply(NEAREST, gm)) == ["the length of its sums is symbolic"]
    assert counts(gm) == (1, 1, 0)


def test_forward_products_are_left_alone() -> None:
    gm = make_fx(lambda dy, x: dy.t() @ u8(x), tracing_mode="fake")(DY, X)
    assert untouched(BY_CHANCE, gm).declines == []


@pytest.mark.usefixtures("dot_products")
@pytest.mark.parametrize(("integer", "wanted"), [(0.6, 1), (0.95, 0)])
def test_auto_follows_the_measurement(integer: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Problem] = []

    def measured(problem: Problem) -> Times:
        seen.append(problem)
        return Times(1.0, integer)

    monkeypatch.setattr(use_integer_backward, "times", measured)
    monkeypatch.setattr(use_integer_backward, "seconds_of_a_sweep", lambda: 0.0)
    gm, _, _ = graph_of("dw")
    result = UseIntegerBackward(options=IntegerBackward(mode="auto")).run(gm)
    assert counts(gm)[1] == wanted
    assert seen == [Problem(lhs=(10, 48), rhs=(48, 6), dtype=torch.float32, device="cpu", signed=False)]
    assert reasons(result) == ([] if wanted else ["integers take 0.95 of its time here, as measured"])


@pytest.mark.usefixtures("dot_products")
def test_auto_counts_what_outliers_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps more of 48 · 6 elements at 1.25 ms, and a tenth of the float product: (0.5 + 4 · 0.36 + 0.2) / 2."""
    monkeypatch.setattr(use_integer_backward, "times", lambda problem: Times(2.0, 0.5))
    monkeypatch.setattr(use_integer_backward, "seconds_of_a_sweep", lambda: 1.25e-3)
    few = IntegerBackward(mode="auto", rounding="nearest", outliers=0.1)
    gm, _, _ = graph_of("dw")
    assert reasons(UseIntegerBackward(options=few).run(gm)) == ["integers take 1.07 of its time here, as measured"]


@pytest.mark.usefixtures("dot_products")
def test_auto_counts_what_rounding_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sweeps of 48 · 6 elements at 1.5 ms, beside half of the product's 2 s: 0.5 + 0.648; or two."""
    monkeypatch.setattr(use_integer_backward, "times", lambda problem: Times(2.0, 1.0))
    monkeypatch.setattr(use_integer_backward, "seconds_of_a_sweep", lambda: 1.5e-3)
    for rounding, ratio in (("stochastic", 1.15), ("nearest", 0.93)):
        gm, _, _ = graph_of("dw")
        result = UseIntegerBackward(options=IntegerBackward(mode="auto", rounding=rounding)).run(gm)
        told = f"integers take {ratio:.2f} of its time here, as measured"
        assert reasons(result) == ([told] if ratio > 1 / 1.1 else [])


def test_auto_measures_nothing_where_integers_never_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(problem: Problem) -> Times:
        raise AssertionError("it is measured")

    monkeypatch.setattr(use_integer_backward, "times", measured)
    monkeypatch.setattr(use_integer_backward, "never_faster", lambda device: f"no dot products on {device}")
    gm, _, _ = graph_of("dw")
    result = untouched(UseIntegerBackward(options=IntegerBackward(mode="auto")), gm)
    assert reasons(result) == ["no dot products on cpu"]


def test_options_are_part_of_the_key() -> None:
    few = UseIntegerBackward(options=IntegerBackward(mode=True, outliers=0.01))
    keys = {each.uuid() for each in (NEAREST, BY_CHANCE, few, UseIntegerBackward())}
    assert len(keys) == 4 and all(instructions() in key for key in keys)
