"""Rounding to small floating-point formats: against ml_dtypes, torch's float8 casts and ONNX, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.floating import power_of_two_below, round_to_float
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat, float_format
from fxquant.ops.floating import DEQUANTIZE_FLOAT, dequantize_float, fake_quantize_float, quantize_float
from fxquant.ops.stochastic import uniform
from tests.ops.oracle import assert_same_bits

THEIRS: dict[str, Any] = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ONNX_TYPES = {"e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}
NAN, INF = float("nan"), float("inf")
formats = pytest.mark.parametrize("format", FLOAT_FORMATS.values(), ids=str)
float8 = pytest.mark.parametrize("name", FLOAT8)
wide_types = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def code_points(format: FloatFormat) -> np.ndarray:
    """Every finite value from 0 up, in order, decoded by ml_dtypes."""
    bits = 1 + format.exponent_bits + format.mantissa_bits
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(THEIRS[format.name]).astype(np.float64)
    return values[np.isfinite(values)]


def cast(x: np.ndarray, format: FloatFormat, saturate: bool) -> np.ndarray:
    """ml_dtypes' rounding of float32, `nearest` for float64: ml_dtypes rounds that to float32 first."""
    if x.dtype == np.float64:
        return nearest(x, format, saturate)
    with np.errstate(all="ignore"):
        clipped = np.clip(x, -format.max, format.max) if saturate else x  # it does not saturate by itself
        y = clipped.astype(THEIRS[format.name]).astype(x.dtype)
    return np.where(np.isnan(x), x.dtype.type(np.nan), y)


def nearest(x: np.ndarray, format: FloatFormat, saturate: bool) -> np.ndarray:
    """By search in the table of values: a tie goes to the even code, and codes count up with values."""
    points = code_points(format)
    beyond = points[-1] + (points[-1] - points[-2])
    table = np.append(points, beyond)
    middles = (table[1:] + table[:-1]) / 2
    with np.errstate(all="ignore"):
        magnitude = np.abs(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300))
        index = np.searchsorted(middles, magnitude, side="left")  # a tie: the lower one
        index += np.isin(magnitude, middles) & (index % 2 == 1)
        found = np.append(table, beyond)[index]
        past = format.max if saturate else np.inf if format.has_infinity else np.nan
        found = np.where(found > format.max, past, found)
        return np.where(np.isnan(x), np.nan, np.copysign(found, x)).astype(x.dtype)


def critical(format: FloatFormat, dtype: Any) -> np.ndarray:
    """Code points, the middles between them and past the last, the neighbours of all these, both signs, specials."""
    points = code_points(format)
    past = [format.max + (points[-1] - points[-2]) * k for k in (0.5, 1.0, 1.5, 2.0)]
    found = np.concatenate([points, (points[1:] + points[:-1]) / 2, past]).astype(dtype)
    near = [np.nextafter(found, dtype(to)) for to in (np.inf, -np.inf)]
    ends = np.array([0, np.nan, np.inf, np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal])
    magnitudes = np.concatenate([found, *near, ends.astype(dtype)])
    return np.concatenate([magnitudes, -magnitudes])


def random_bits(dtype: Any, count: int) -> np.ndarray:
    integer = np.uint32 if dtype == np.float32 else np.uint64
    return np.random.default_rng(0).integers(0, np.iinfo(integer).max, count, dtype=integer).view(dtype)


@formats
def test_the_table_agrees_with_ml_dtypes(format: FloatFormat) -> None:
    info = ml_dtypes.finfo(THEIRS[format.name])
    assert float(info.max) == format.max == code_points(format)[-1]
    assert float(info.smallest_subnormal) == format.smallest_subnormal == code_points(format)[1]
    assert float(info.tiny) == 2.0**format.emin
    assert 2.0**format.emax <= format.max < 2.0 ** (format.emax + 1)
    bits = 1 + format.exponent_bits + format.mantissa_bits
    every = np.arange(2**bits, dtype=np.uint8).view(THEIRS[format.name]).astype(np.float64)
    assert np.isinf(every).any() == format.has_infinity
    assert np.isnan(every).any() == format.has_nan


@pytest.mark.parametrize("given", ["e3m2", (3, 2), FLOAT_FORMATS["e3m2"]], ids=["name", "widths", "itself"])
def test_a_format_by_name_or_widths(given: Any) -> None:
    assert float_format(given) is FLOAT_FORMATS["e3m2"]


@pytest.mark.parametrize("given", ["e8m0", (8, 0), "E4M3"], ids=str)
def test_an_unknown_format(given: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"`format` must name .*: got .*'e4m3' \(4, 3\).*'e2m1' \(2, 1\)"):
        float_format(given)


@formats
def test_the_table_search_is_ml_dtypes_rounding(format: FloatFormat) -> None:
    """Two independent oracles, on what both can do."""
    x = np.concatenate([critical(format, np.float32), random_bits(np.float32, 50_000)])
    for saturate in (True, False) if format.overflows else (True,):
        assert_same_bits(*(torch.from_numpy(oracle(x, format, saturate)) for oracle in (nearest, cast)))


@wide_types
@formats
def test_critical_values(format: FloatFormat, dtype: Any) -> None:
    x = critical(format, dtype)
    for saturate in (True, False) if format.overflows else (True,):
        got = round_to_float(torch.from_numpy(x), format, saturate=saturate)
        assert_same_bits(got, torch.from_numpy(cast(x, format, saturate)))


@pytest.mark.parametrize(("dtype", "count"), [(np.float32, 1_000_000), (np.float64, 200_000)], ids=["f32", "f64"])
@formats
def test_random_bit_patterns(format: FloatFormat, dtype: Any, count: int) -> None:
    # All exponents, and as many again around the format's own.
    near = np.random.default_rng(1).standard_normal(count // 4) * 2.0**format.emin * 4
    x = np.concatenate([random_bits(dtype, count), near.astype(dtype), (near * format.max / 8).astype(dtype)])
    for saturate in (True, False) if format.overflows else (True,):
        got = round_to_float(torch.from_numpy(x), format, saturate=saturate)
        assert_same_bits(got, torch.from_numpy(cast(x, format, saturate)))


@formats
def test_float64_is_rounded_once(format: FloatFormat) -> None:
    """A hair beside a tie: rounded to float32 first, it would be the tie."""
    points = code_points(format)
    ties = (points[1:] + points[:-1]) / 2
    for hair, expected in ((2.0**-40, points[1:]), (-(2.0**-40), points[:-1])):
        x = torch.from_numpy(ties * (1 + hair))
        assert_same_bits(round_to_float(x, format), torch.from_numpy(expected))
        tie = x.float()
        assert torch.equal(tie, torch.from_numpy(ties).float())
        assert not torch.equal(round_to_float(tie, format).double(), torch.from_numpy(expected))


@wide_types
def test_power_of_two_below(dtype: Any) -> None:
    x = random_bits(dtype, 100_000)
    x = x[np.isfinite(x) & (np.abs(x) >= np.finfo(dtype).tiny)]
    expected = np.ldexp(dtype(1), np.frexp(np.abs(x))[1] - 1)
    assert_same_bits(power_of_two_below(torch.from_numpy(x)), torch.from_numpy(expected))
    odd = torch.tensor([0.0, -0.0, 1e-40, INF, -INF, NAN])
    assert power_of_two_below(odd).tolist() == [0, 0, 0, INF, INF, INF]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30),
    name=st.sampled_from(list(FLOAT_FORMATS)),
)
def test_odd_monotone_and_idempotent(values: list[float], name: str) -> None:
    x = torch.tensor(sorted(values))
    y = round_to_float(x, FLOAT_FORMATS[name])
    assert (y.diff() >= 0).all()
    assert_same_bits(round_to_float(-x, FLOAT_FORMATS[name]), -y)
    assert_same_bits(round_to_float(y, FLOAT_FORMATS[name]), y)


@formats
def test_stochastic_rounding_goes_to_a_neighbour(format: FloatFormat) -> None:
    points = torch.from_numpy(code_points(format)).float()
    on_grid = torch.cat([points, -points])
    u = torch.rand(on_grid.shape, generator=torch.Generator().manual_seed(0))
    assert_same_bits(round_to_float(on_grid, format, uniform=u), on_grid)
    quarter = points[:-1] + (points[1:] - points[:-1]) / 4
    for at, expected in ((0.0, points[1:]), (0.24, points[1:]), (0.25, points[:-1]), (0.999, points[:-1])):
        u = torch.full_like(quarter, at)
        assert_same_bits(round_to_float(quarter, format, uniform=u), expected)
        assert_same_bits(round_to_float(-quarter, format, uniform=u), -expected)
    specials = torch.tensor([NAN, INF, -INF, 1e30, 0.0, -0.0])
    assert_same_bits(
        round_to_float(specials, format, uniform=torch.zeros(6)),
        torch.tensor([NAN, format.max, -format.max, format.max, 0.0, -0.0]),
    )


@formats
def test_stochastic_rounding_is_unbiased(format: FloatFormat) -> None:
    count = 100_000
    for x in (0.3 * format.smallest_subnormal, 1.07, -0.77 * format.max):
        y = fake_quantize_float(torch.full((count,), x, dtype=torch.float64), format=format, seed=7)
        assert len(y.unique()) == 2
        assert abs(y.mean() - x) < 5 * y.std() / count**0.5


# Operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@formats
def test_fake_quantize_is_cast_and_product(format: FloatFormat, dtype: torch.dtype) -> None:
    wide = np.float64 if dtype == torch.float64 else np.float32
    x = torch.from_numpy(np.concatenate([critical(format, wide) * 0.3, critical(format, wide)])).to(dtype)
    got = fake_quantize_float(x, 0.3, format)
    scale = np.float32(0.3) if wide is np.float32 else 0.3
    with np.errstate(all="ignore"):
        steps = x.to(torch.float64 if wide is np.float64 else torch.float32).numpy() / scale
        expected = cast(steps, format, True) * scale
    assert_same_bits(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3), torch.tensor([[0.3]])], ids=["number", "0-d", "1 element"])
def test_forms_of_one_scale(value: Any) -> None:
    x = torch.randn(4, 5)
    assert_same_bits(fake_quantize_float(x, value), fake_quantize_float(x / 0.3) * 0.3)
    assert_same_bits(fake_quantize_float(x[0, 0], value), fake_quantize_float(x, value)[0, 0])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scales_along_an_axis(axis: int) -> None:
    x = torch.randn(4, 5, 6)
    scale = torch.linspace(0.01, 2, x.shape[axis])
    expected = [fake_quantize_float(row, s) for row, s in zip(x.unbind(axis), scale, strict=True)]
    assert_same_bits(fake_quantize_float(x, scale, axis=axis), torch.stack(expected, axis))
    code = quantize_float(x, scale, axis=axis)
    assert_same_bits(dequantize_float(code, scale, axis=axis), torch.stack(expected, axis))


def test_scales_that_are_not_positive_follow_ieee() -> None:
    x = torch.tensor([1.0, -2.0])
    assert_same_bits(fake_quantize_float(x, -0.5), x)
    assert fake_quantize_float(x, NAN).isnan().all()
    assert_same_bits(fake_quantize_float(x, 0.0), torch.tensor([0.0, -0.0]))
    assert fake_quantize_float(torch.zeros(1), 0.0).isnan().all()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "overflow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_passes_within_the_range(dtype: torch.dtype, saturate: bool, seed: int | None) -> None:
    scale = torch.tensor([[0.5], [2.0]])
    x = torch.tensor([[0.1, 223.0, -224.0, 226.0, NAN, INF, -0.0]] * 2).to(dtype).requires_grad_()
    y = fake_quantize_float(x, scale, "e4m3", saturate=saturate, seed=seed)
    grad = torch.arange(1.0, 15).reshape(2, 7).to(dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    inside = [[True, True, True, False, False, False, True], [True, True, True, True, False, False, True]]
    assert_same_bits(got, grad * torch.tensor(inside))


def test_second_derivative_and_no_gradient_to_scale() -> None:
    x = torch.tensor([0.3, 1.0, 900.0], dtype=torch.float64).requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64).requires_grad_()
    y = fake_quantize_float(x, scale)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True, allow_unused=True)
    assert torch.equal(first, 2 * y * torch.tensor([1, 1, 0]))
    assert torch.equal(second, torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64))
    assert not torch.autograd.grad(y.sum(), scale, allow_unused=True)[0]


# 8-bit tensors


@float8
def test_eight_bits_equal_torchs_cast(name: str) -> None:
    x = torch.from_numpy(
        np.concatenate([random_bits(np.float32, 1_000_000), critical(FLOAT_FORMATS[name], np.float32)])
    )
    got, expected = quantize_float(x, None, FLOAT8[name], saturate=False), x.to(FLOAT8[name])
    # What torch's cast makes of too large values depends on its version: infinity, NaN, or the largest value.
    fits = ~x.isnan() & ~(round_to_float(x, FLOAT_FORMATS[name], saturate=False).abs() > FLOAT_FORMATS[name].max)
    fits &= ~round_to_float(x, FLOAT_FORMATS[name], saturate=False).isnan()
    assert fits.sum() > 500_000
    assert torch.equal(got.view(torch.uint8)[fits], expected.view(torch.uint8)[fits])
    assert torch.equal(got.float().isfinite(), fits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@float8
def test_the_pair_is_fake_quantization(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(critical(FLOAT_FORMATS[name], np.float32) * np.float32(0.7)).to(dtype)
    for saturate in (True, False):
        code = quantize_float(x, 0.7, FLOAT8[name], saturate=saturate)
        assert code.dtype == FLOAT8[name]
        assert_same_bits(dequantize_float(code, 0.7, dtype), fake_quantize_float(x, 0.7, name, saturate=saturate))


def onnx_model(name: str, scale: np.ndarray, axis: int, saturate: bool) -> onnx.ModelProto:
    """QuantizeLinear to float8, its bits given out through a cast to float32, which is exact."""
    kind = TensorProto.FLOAT
    zero = helper.make_tensor("zero", ONNX_TYPES[name], scale.shape, [0.0] * scale.size)
    initializers = [helper.make_tensor("scale", kind, scale.shape, scale.reshape(-1).tolist()), zero]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["code"], axis=axis, saturate=int(saturate)),
        helper.make_node("Cast", ["code"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["code", "scale", "zero"], ["back"], axis=axis),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    outputs.append(helper.make_tensor_value_info("back", kind, None))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, None)], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_reference(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, {"x": x})


def by_onnxruntime(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


# onnxruntime 1.31 with saturate=0 departs from the specification: e5m2 overflows to NaN where it should be infinity,
# and e4m3 keeps some values above 464 at 448.
@pytest.mark.parametrize(
    ("run", "saturate"),
    [(by_reference, True), (by_reference, False), (by_onnxruntime, True)],
    ids=["reference", "reference, overflow", "onnxruntime"],
)
@pytest.mark.parametrize("channels", [False, True], ids=["tensor", "axis"])
@float8
def test_equal_to_onnx_quantize_linear(
    name: str, channels: bool, saturate: bool, run: Callable[[onnx.ModelProto, np.ndarray], list[np.ndarray]]
) -> None:
    scale = np.array([0.3, 1e-3, 7.0], dtype=np.float32) if channels else np.array(0.3, dtype=np.float32)
    row = np.concatenate([critical(FLOAT_FORMATS[name], np.float32), random_bits(np.float32, 5000)])
    with np.errstate(all="ignore"):
        x = np.stack([row * s for s in scale]) if channels else row * scale
    code, back = run(onnx_model(name, scale, 0, saturate), x)
    axis = 0 if channels else None
    got = quantize_float(torch.from_numpy(x), torch.from_numpy(scale), FLOAT8[name], axis=axis, saturate=saturate)
    assert_same_bits(got.float(), torch.from_numpy(code))
    assert_same_bits(dequantize_float(got, torch.from_numpy(scale), axis=axis), torch.from_numpy(back))


@float8
def test_opcheck_of_float8_codes(name: str) -> None:
    """All but "test_schema", which compares arguments by torch.allclose: not implemented for float8."""
    code = torch.randn(3, 4).to(FLOAT8[name])
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(DEQUANTIZE_FLOAT, (code, torch.tensor(0.5)), test_utils=checks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize_float(x, format="e4m2"), r"`format` must name a floating-point format: got 'e4m2'"),
        (lambda x: fake_quantize_float(x, format="e2m1", saturate=False), "`saturate` must be True for e2m1"),
        (lambda x: fake_quantize_float(x, torch.ones(2)), r"`scale` must broadcast .* \(2, 3\): got shape \(2,\)"),
        (lambda x: fake_quantize_float(x, torch.ones(2, 1, 3)), r"`scale` must broadcast .*got shape \(2, 1, 3\)"),
        (lambda x: fake_quantize_float(x[:, :1], torch.ones(2, 3)), r"`scale` must broadcast to .* \(2, 1\)"),
        (lambda x: fake_quantize_float(x, torch.ones(2), axis=1), r"`axis` must name a dimension as long as .*got 1"),
        (lambda x: fake_quantize_float(x, torch.ones(2), axis=2), r"`axis` must name a dimension .*got 2"),
        (lambda x: fake_quantize_float(x, 0.5, axis=0), r"`scale` must be a vector where `axis` is given: got 0.5"),
        (lambda x: fake_quantize_float(x, torch.ones(1, dtype=torch.int32)), "`scale` must be a floating-point tensor"),
        (lambda x: fake_quantize_float(x.int()), "`input` must be a floating-point tensor: got Int"),
        (lambda x: fake_quantize_float(x, seed=torch.zeros(2)), "`seed` must be an int64 tensor of two elements"),
        (lambda x: fake_quantize_float(x, seed=2**63), "`seed` must fit in a signed 64-bit integer: got 9223372036"),
        (lambda x: quantize_float(x, 1.0, torch.int8), "`dtype` must be torch.float8_e4m3fn or .*got torch.int8"),
        (lambda x: dequantize_float(x, 1.0), "`code` must be torch.float8_e4m3fn or .*got torch.float32"),
        (
            lambda x: dequantize_float(x.to(torch.float8_e5m2), 1.0, torch.int8),
            "`dtype` must be one of Float, Double, Half, BFloat16: got torch.int8",
        ),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((InvalidArgument, NotImplementedError), match=message):
        call(torch.zeros(2, 3))


def test_stochastic_draws_by_position() -> None:
    x = torch.randn(5, 7)
    u = uniform(11, x)
    assert_same_bits(fake_quantize_float(x, seed=11), round_to_float(x, FLOAT_FORMATS["e4m3"], uniform=u))
    assert_same_bits(fake_quantize_float(x.t().contiguous().t(), seed=11), fake_quantize_float(x, seed=11))
