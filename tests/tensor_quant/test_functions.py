"""The amax quantizers: against numpy and ml_dtypes, their gradients, their errors, ModelOpt's classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.amax import _stored
from fxquant.ops import amax as ops
from fxquant.ops.amax import fake_tensor_quant_learnable, legacy_fake_tensor_quant, scaled_float, scaled_float_learnable
from fxquant.tensor_quant import (
    FakeAffineTensorQuantFunction,
    FakeTensorQuantFunction,
    LegacyFakeTensorQuantFunction,
    ScaledE4M3Function,
    TensorQuantFunction,
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    scaled_e4m3_abstract,
    tensor_quant,
)
from tests.ops.oracle import assert_same_bits, hard_values

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
FLOATS = {
    (4, 3): (ml_dtypes.float8_e4m3fn, 448.0),
    (5, 2): (ml_dtypes.float8_e5m2, 57344.0),
    (3, 2): (ml_dtypes.float6_e3m2fn, 28.0),
    (2, 3): (ml_dtypes.float6_e2m3fn, 7.5),
    (2, 1): (ml_dtypes.float4_e2m1fn, 6.0),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_float = pytest.mark.parametrize("widths", FLOATS, ids=str)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(x: Tensor) -> np.ndarray:
    """The values as numpy holds them in the dtype of the arithmetic."""
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()


def integers(x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale by numpy, straight from the definition."""
    values, reach = wide(x), wide(amax).astype(wide(x).dtype)
    top = 2 ** (bits - 1 + unsigned) - 1
    bottom = 0 if unsigned else -top if narrow else -top - 1
    with np.errstate(all="ignore"):
        scale = (np.asarray(top, values.dtype) / reach).astype(values.dtype)
        codes = np.clip(np.rint(values * scale), bottom, top)
    dead = reach <= 2.0**-24
    return np.where(dead, 0, codes).astype(values.dtype), np.where(dead, 1, scale).astype(values.dtype)


def as_dtype(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(values, order="C")).to(dtype)


FORMS = [(8, False, True), (8, False, False), (8, True, True), (4, False, False), (2, False, True), (16, True, False)]


def inputs(dtype: torch.dtype, unsigned: bool) -> Tensor:
    x = hard_values(1.5 / 127, -128, 127, dtype)
    return x.abs() if unsigned else x


@pytest.mark.parametrize("form", FORMS, ids=str)
@each_dtype
def test_integers_are_those_of_numpy(dtype: torch.dtype, form: tuple[int, bool, bool]) -> None:
    for value in (1.5, 2.0**-23, 3e38, 1e-3):
        x, amax = inputs(dtype, form[1]), torch.tensor(value)
        codes, scale = integers(x, amax, *form)
        with np.errstate(over="ignore"):  # the lowest of 4 bits, -8/7 of 3e38
            expected = as_dtype(codes / scale, dtype)
        torch.testing.assert_close(fake_tensor_quant(x, amax, *form), expected, rtol=0, atol=0, equal_nan=True)
        if dtype == torch.float16 and scale > 65504:
            continue
        got, got_scale = tensor_quant(x, amax, *form)
        torch.testing.assert_close(got, as_dtype(codes, dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got_scale, as_dtype(scale, dtype)) and got_scale.shape == amax.shape
        quotient = (got.to(torch.float64 if dtype == torch.float64 else torch.float32) / got_scale).to(dtype)
        torch.testing.assert_close(legacy_fake_tensor_quant(x, amax, *form), quotient, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=24),
    amax=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 16),
    unsigned=st.booleans(),
    narrow=st.booleans(),
)
def test_the_equation_by_rows(
    values: list[float], amax: list[float], dtype: torch.dtype, bits: int, unsigned: bool, narrow: bool
) -> None:
    x = torch.tensor([values] * len(amax), dtype=torch.float64).to(dtype)
    x = x.abs() if unsigned else x
    reach = torch.tensor(amax).unsqueeze(1)
    codes, scale = integers(x, reach, bits, unsigned, narrow)
    expected = as_dtype(codes / scale, dtype)
    y = fake_tensor_quant(x, reach, bits, unsigned, narrow)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.shape == x.shape and y.dtype == dtype


@pytest.mark.parametrize(
    "shape", [(1,), (3, 1, 1), (2, 3, 1, 1), (1, 3, 4, 1), (2, 3, 4, 5), (1, 1, 1, 1), (5,)], ids=str
)
def test_amax_broadcasts(shape: tuple[int, ...]) -> None:
    x, amax = randn(2, 3, 4, 5), torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    codes, scale = integers(x, amax, 8, False, True)
    assert torch.equal(fake_tensor_quant(x, amax), as_dtype(codes / scale, x.dtype))
    got, got_scale = tensor_quant(x, amax)
    assert torch.equal(got, as_dtype(codes, x.dtype)) and got_scale.shape == amax.shape
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, a: (fake_tensor_quant(x, a), *tensor_quant(x, a)), fullgraph=True)
    for one, other in zip(compiled(x, amax), (fake_tensor_quant(x, amax), got, got_scale), strict=True):
        assert_same_bits(one, other)


def test_one_element_has_no_rank() -> None:
    x = torch.tensor(0.3)
    assert fake_tensor_quant(x, torch.ones(1, 1)).shape == ()
    assert tensor_quant(x, torch.ones(1, 1))[1].shape == (1, 1)


@pytest.mark.parametrize("value", [0.0, 2.0**-24, -0.0])
def test_an_amax_of_nothing_gives_zero_for_its_own_slice_only(value: float) -> None:
    x = torch.tensor([[1.0, -INF, NAN, 0.3]] * 2)
    amax = torch.tensor([[value], [1.0]])
    codes, scale = tensor_quant(x, amax)
    assert torch.equal(codes[0], torch.zeros(4)) and scale[0] == 1
    assert torch.equal(fake_tensor_quant(x, amax)[0], torch.zeros(4))
    assert torch.equal(legacy_fake_tensor_quant(x, amax)[0], torch.zeros(4))
    assert codes[1].tolist()[:2] == [127.0, -127.0] and codes[1, 2].isnan() and scale[1] == 127


@each_dtype
def test_nan_stays_nan_and_infinity_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([NAN, INF, -INF], dtype=dtype)
    for y in (
        fake_tensor_quant(x, 1.0, 8, False, True),
        legacy_fake_tensor_quant(x, 1.0),
        scaled_float(x, 1.0),
        tensor_quant(x, 1.0)[0] / 127,
    ):
        assert y[0].isnan() and y[1:].tolist() == [1.0, -1.0]
    y = fake_affine_tensor_quant(x, -1.0, 1.0)
    assert y[0].isnan() and y[1] > 0.99 and y[2] < -0.99
    assert torch.equal(fake_tensor_quant(x[1:].abs(), 1.0, 8, True), torch.ones(2, dtype=dtype))


def test_rounding_of_stored_values_is_the_cast() -> None:
    patterns = torch.randint(-(2**31), 2**31, (500_000,), generator=torch.Generator().manual_seed(0))
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    ends = torch.tensor([65519.0, 65519.99, 65520.0, 2.0**-25, 1.5 * 2.0**-24, 3.4e38, INF, NAN, -0.0])
    halves = [every.view(dtype).float() for dtype in (torch.float16, torch.bfloat16)]
    x = torch.cat([patterns.to(torch.int32).view(torch.float32), *halves, ends])
    for dtype in (torch.float16, torch.bfloat16):
        assert_same_bits(_stored(x, dtype), x.to(dtype).float())


@each_float
@each_dtype
def test_floats_are_those_of_ml_dtypes(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    kind, top = FLOATS[widths]
    for amax in (None, 1.5, 448.0, 1e-3):
        x = hard_values((amax or top) / top, -448, 448, dtype)
        values = wide(x)
        scale, back = np.ones((), values.dtype), np.ones((), values.dtype)
        if amax is not None:
            reach = wide(torch.tensor(amax)).astype(values.dtype)
            scale, back = np.asarray(top, values.dtype) / reach, reach / np.asarray(top, values.dtype)
        nan = np.isnan(values)
        with np.errstate(all="ignore"):
            scaled = np.clip(np.where(nan, 0, values * scale), -top, top)
        rounded = scaled.astype(kind).astype(values.dtype)
        expected = as_dtype(np.where(nan, NAN, rounded * back).astype(values.dtype), dtype)
        got = scaled_float(x, None if amax is None else torch.tensor(amax), *widths)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_fp8_saturates_where_the_original_gave_nan() -> None:
    x = torch.tensor([1.03, 1.04, 2.0, -1e30, INF])
    assert scaled_e4m3(x, 1.0).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0]


def test_an_fp8_amax_of_nothing_counts_as_one() -> None:
    x = randn(64)
    for value in (0.0, 2.0**-24):
        assert_same_bits(scaled_e4m3(x, value), scaled_e4m3(x, 1.0))
    assert not torch.equal(scaled_e4m3(x, 2.0**-23), scaled_e4m3(x, 1.0))


def test_the_abstract_function_has_shape_and_dtype_only() -> None:
    x = randn(2, 3, 4, 5).to(memory_format=torch.channels_last).half()
    y = scaled_e4m3_abstract(x, torch.tensor(1.0))
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    assert scaled_e4m3_abstract(x.to("meta"), None).device.type == "meta"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@each_dtype
def test_affine_is_that_of_numpy(dtype: torch.dtype, bits: int) -> None:
    for low, high in ((-0.7, 1.9), (0.0, 6.0), (-3.0, 0.0), (1.0, 2.0), (-5.0, -4.0)):
        x = torch.cat([hard_values((high - low) / (2**bits - 1), -8, 8, dtype), randn(200, dtype=dtype) * 3])
        values = wide(x)
        bottom, top = (np.asarray(np.float32(end), values.dtype) for end in (low, high))
        if dtype == torch.float64:
            bottom, top = np.asarray(low), np.asarray(high)
        step = (top - bottom) / np.asarray(2**bits - 1, values.dtype)
        half = 2 ** (bits - 1)
        zero = np.rint(bottom / step) + np.asarray(half, values.dtype)
        with np.errstate(all="ignore"):
            y = (np.clip(np.rint(values / step) - zero, -half, half - 1) + zero) * step
        got = fake_affine_tensor_quant(x, low, high, bits)
        torch.testing.assert_close(got, as_dtype(y.astype(values.dtype), dtype), rtol=0, atol=0, equal_nan=True)
    tensors = fake_affine_tensor_quant(x, torch.tensor(-5.0), torch.tensor([-4.0]), bits)
    assert_same_bits(tensors, got)


STRAIGHT: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tensor_quant": (tensor_quant, TensorQuantFunction.apply),
    "fake_tensor_quant": (fake_tensor_quant, FakeTensorQuantFunction.apply),
    "legacy": (legacy_fake_tensor_quant, LegacyFakeTensorQuantFunction.apply),
    "scaled_e4m3": (scaled_e4m3, ScaledE4M3Function.apply),
}
each_pair = pytest.mark.parametrize("pair", STRAIGHT.values(), ids=STRAIGHT)


def outputs(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@each_pair
@each_dtype
def test_gradient_passes_where_x_is_at_most_amax(dtype: torch.dtype, pair: Any) -> None:
    x = torch.tensor([[NAN, INF, -1.0, 1.0, 1.001, 0.2, -0.0, -1.002]] * 2).to(dtype)
    amax = torch.tensor([[1.0], [0.25]]).requires_grad_()
    grad = randn(2, 8, seed=3, dtype=dtype)
    mask = np.abs(wide(x)) <= wide(amax)
    for call in pair:
        leaf = x.clone().requires_grad_()
        got, reach = torch.autograd.grad(outputs(call(leaf, amax))[0], (leaf, amax), grad, allow_unused=True)
        assert_same_bits(got, torch.where(torch.from_numpy(mask), grad, 0.0))
        assert reach is None


@pytest.mark.parametrize("call", [fake_affine_tensor_quant, FakeAffineTensorQuantFunction.apply], ids=["op", "class"])
def test_affine_gradient_passes_within_the_range(call: Callable[..., Tensor]) -> None:
    x = torch.tensor([NAN, INF, -0.5, 2.0, -0.501, 2.001, 0.0]).requires_grad_()
    (got,) = torch.autograd.grad(call(x, -0.5, 2.0).sum(), x)
    assert got.tolist() == [0, 0, 1, 1, 0, 0, 1]


def test_bare_float_casts_clip_the_gradient_at_the_largest_value() -> None:
    x = torch.tensor([448.0, 448.1, -449.0, 1.0, NAN]).requires_grad_()
    for call in (scaled_e4m3, ScaledE4M3Function.apply):
        assert torch.autograd.grad(call(x, None).sum(), x)[0].tolist() == [1, 0, 0, 1, 0]


def saved(call: Callable[[Tensor], Tensor]) -> int:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(randn(4, 5).requires_grad_())
    return len(kept)


def test_pass_through_saves_nothing() -> None:
    for quantize in (fake_tensor_quant, scaled_float):
        assert saved(lambda x, q=quantize: q(x, torch.tensor(0.1))) == 2
        assert saved(lambda x, q=quantize: q(x, torch.tensor(0.1), pass_through=True)) == 0
        x = randn(50).requires_grad_()
        (grad,) = torch.autograd.grad(quantize(x, 0.1, pass_through=True).sum(), x)
        assert torch.equal(grad, torch.ones(50))
        assert_same_bits(quantize(x, 0.1, pass_through=True), quantize(x, 0.1))


def test_double_backward() -> None:
    x = torch.tensor([-5.0, 0.3, 0.9], dtype=torch.float64).requires_grad_()
    for call in (fake_tensor_quant, FakeTensorQuantFunction.apply, scaled_e4m3):
        y = call(x, torch.tensor(1.0))
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, 6 * y.detach() * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("form", [(8, False, True), (4, False, False), (4, True, True), (2, False, True)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 1, 4)], ids=str)
@each_dtype
def test_learned_integer_amax(dtype: torch.dtype, shape: tuple[int, ...], form: tuple[int, bool, bool]) -> None:
    """Against the formula in float64 numpy: the code over B where clipped, its error over B inside."""
    x = randn(3, 5, 4, dtype=dtype)
    x = (x.abs() if form[1] else x).requires_grad_()
    amax = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.3).requires_grad_()
    grad = randn(3, 5, 4, seed=2, dtype=dtype)
    y = fake_tensor_quant_learnable(x, amax, *form)
    assert_same_bits(y.detach(), fake_tensor_quant(x.detach(), amax.detach(), *form))
    dx, da = torch.autograd.grad(y, (x, amax), grad)
    assert_same_bits(dx, torch.where(x.abs().to(torch.float64) <= amax, grad, 0.0))
    codes, scale = integers(x, amax, *form)
    top = 2 ** (form[0] - 1 + form[1]) - 1
    inside = np.abs(wide(x)) <= wide(amax)
    slope = np.where(inside, codes.astype(np.float64) - wide(x).astype(np.float64) * scale, codes) / top
    full = torch.from_numpy(grad.to(torch.float64).numpy() * slope)
    expected = full.sum_to_size(shape) if shape else full.sum()
    assert da.dtype == amax.dtype and da.shape == amax.shape
    torch.testing.assert_close(da.to(torch.float64), expected.reshape(shape), rtol=2e-5, atol=2e-5)


def test_learned_amax_is_the_derivative_where_everything_clips() -> None:
    """There is no rounding error there: y = ±amax, so numbers are exact and finite differences agree."""
    x = torch.tensor([-3.0, 2.0, 5.0], dtype=torch.float64)
    amax = torch.tensor(1.25, dtype=torch.float64).requires_grad_()
    for quantize in (fake_tensor_quant_learnable, scaled_float_learnable):
        assert torch.autograd.gradcheck(lambda a, q=quantize: q(x, a), (amax,))
        (got,) = torch.autograd.grad(quantize(x, amax).sum(), amax)
        torch.testing.assert_close(got, torch.tensor(1.0, dtype=torch.float64))
    (got,) = torch.autograd.grad(fake_tensor_quant_learnable(x, amax, 8, False, False)[0], amax)
    torch.testing.assert_close(got, torch.tensor(-128 / 127, dtype=torch.float64))


@each_float
def test_learned_float_amax(widths: tuple[int, int]) -> None:
    x, grad = randn(6, 40).requires_grad_(), randn(6, 40, seed=2)
    amax = torch.linspace(0.2, 3, 6).unsqueeze(1).requires_grad_()
    y = scaled_float_learnable(x, amax, *widths)
    assert_same_bits(y.detach(), scaled_float(x.detach(), amax.detach(), *widths))
    dx, da = torch.autograd.grad(y, (x, amax), grad)
    kind, top = FLOATS[widths]
    values, reach = x.detach().numpy(), amax.detach().numpy()
    scaled = values * (np.float32(top) / reach)
    rounded = np.clip(scaled, -top, top).astype(kind).astype(np.float64)
    inside = np.abs(values) <= reach
    slope = np.where(inside, rounded - scaled, rounded) / top
    torch.testing.assert_close(
        da.double(), torch.from_numpy((grad.numpy() * slope).sum(1, keepdims=True)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(dx, torch.where(torch.from_numpy(inside), grad, 0.0))


@pytest.mark.parametrize("value", [0.0, 2.0**-24, -0.3])
def test_a_collapsed_learned_amax_can_grow_again(value: float) -> None:
    x, grad = torch.tensor([3.0, -2.0, 0.0]), torch.tensor([0.5, 0.25, 7.0])
    for quantize in (fake_tensor_quant_learnable, scaled_float_learnable):
        amax = torch.tensor(value).requires_grad_()
        y = quantize(x, amax)
        assert y.isfinite().all()
        assert torch.autograd.grad(y, amax, grad)[0].item() == 0.25
    assert torch.equal(fake_tensor_quant_learnable(x, torch.tensor(value)), torch.zeros(3))


def test_nan_in_a_learned_amax_gradient_stays_visible() -> None:
    amax = torch.tensor(1.0).requires_grad_()
    x = torch.tensor([NAN, 0.5]).requires_grad_()
    dx, da = torch.autograd.grad(fake_tensor_quant_learnable(x, amax).sum(), (x, amax))
    assert da.isnan() and dx.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(), (3, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("op", [ops.FAKE_TENSOR_QUANT_LEARNABLE, ops.SCALED_FLOAT_LEARNABLE], ids=str)
def test_opcheck_of_learned_amax(op: Any, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(op, (randn(2, 3, 4).requires_grad_(), torch.full(shape, 0.7).requires_grad_()))


@pytest.mark.parametrize("args", [(), (4,), (4, False), (4, False, False)], ids=str)
@pytest.mark.parametrize(
    "function", [TensorQuantFunction, FakeTensorQuantFunction, LegacyFakeTensorQuantFunction], ids=lambda f: f.__name__
)
def test_classes_take_modelopt_arguments_and_trace(function: Any, args: tuple[Any, ...]) -> None:
    assert issubclass(function, torch.autograd.Function)
    plain = {
        TensorQuantFunction: tensor_quant,
        FakeTensorQuantFunction: fake_tensor_quant,
        LegacyFakeTensorQuantFunction: legacy_fake_tensor_quant,
    }[function]
    amax = torch.tensor([[0.5], [1.0]])

    def run(call: Callable[..., Any]) -> list[Tensor]:
        x = randn(2, 30).requires_grad_()
        found = outputs(call(x, amax, *args))
        return [*found, torch.autograd.grad(found[0].sum(), x)[0]]

    expected = run(plain)
    torch._dynamo.reset()
    for got in (run(function.apply), run(torch.compile(lambda *a: function.apply(*a), fullgraph=True))):
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize(
    ("function", "plain", "args"),
    [
        (ScaledE4M3Function, scaled_e4m3, (torch.tensor(1.0), 4, 3)),
        (ScaledE4M3Function, scaled_e4m3, (None, 4, 3)),
        (ScaledE4M3Function, scaled_e4m3, (torch.tensor(1.0),)),
        (ScaledE4M3Function, scaled_e4m3, (torch.tensor([[0.5], [1.0]]), 5, 2)),
        (FakeAffineTensorQuantFunction, fake_affine_tensor_quant, (-1.0, 0.5)),
        (FakeAffineTensorQuantFunction, fake_affine_tensor_quant, (torch.tensor(-1.0), torch.tensor(0.5), 4)),
        (FakeTensorQuantFunction, fake_tensor_quant, (0.75,)),
    ],
    ids=["e4m3", "bare", "short", "e5m2", "affine", "affine, tensors", "number"],
)
def test_the_other_classes_trace(function: Any, plain: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    def run(call: Callable[..., Any]) -> list[Tensor]:
        x = randn(2, 30).requires_grad_()
        y = call(x, *args)
        return [y, torch.autograd.grad(y.sum(), x)[0]]

    torch._dynamo.reset()
    expected = run(plain)
    for got in (run(function.apply), run(torch.compile(lambda *a: function.apply(*a), fullgraph=True))):
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsigned_compiled_equals_eager(dtype: torch.dtype) -> None:
    """Zeros of both signs meet the lower limit 0."""
    torch._dynamo.reset()
    x = torch.cat([inputs(dtype, True), torch.tensor([-0.0, 0.0], dtype=dtype)])
    compiled = torch.compile(lambda x, a: fake_tensor_quant(x, a, 8, True), fullgraph=True)
    assert_same_bits(compiled(x, torch.tensor(1.5)), fake_tensor_quant(x, 1.5, 8, True))
