"""Codes that are small floats: against ml_dtypes, and against operators that have formats and blocks of their own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import ops
from fxquant.errors import InvalidArgument
from fxquant.numerics import elements
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.ops.elements import dequantize_elements, quantize_elements
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_TENSOR
from fxquant.ops.qparams import affine_qparams, block_qparams, symmetric_qparams

TYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
each_format = pytest.mark.parametrize("name", FLOAT_FORMATS)


def spread(rows: int, columns: int) -> Tensor:
    """Values of many sizes, a row of zeros and one of almost nothing among them."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp() ** 3
    x[1], x[2] = 0.0, 1e-12 * torch.randn(columns)
    return x


def in_rows(x: Tensor, size: int, name: str, scale_format: str, amax: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, size)
    scale, point = block_qparams(rows, amax, int(FLOAT_FORMATS[name].max), scale_format, element=name)
    y = PER_CHANNEL(rows, scale, point, 0, -1, 1, rounding="divide", element=name)
    return y.reshape(x.shape)


@each_format
def test_codes_are_those_of_ml_dtypes(name: str) -> None:
    format = FLOAT_FORMATS[name]
    code = torch.arange(2**format.bits, dtype=torch.int32).to(torch.uint8)
    theirs = torch.from_numpy(code.numpy().view(TYPES[name]).astype(np.float32))
    ours = elements.decode(code, format)
    assert torch.equal(ours.view(torch.int32)[~theirs.isnan()], theirs.view(torch.int32)[~theirs.isnan()])
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    assert torch.equal(elements.encode(theirs[finite], format), code[finite])


@each_format
@settings(max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-1e6, max_value=1e6), min_size=1, max_size=40))
def test_quantize_is_the_cast_of_ml_dtypes(name: str, values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    clipped = np.clip(x, -FLOAT_FORMATS[name].max, FLOAT_FORMATS[name].max)
    code = quantize_elements(torch.from_numpy(x), torch.ones(1), name)
    assert code.tolist() == clipped.astype(TYPES[name]).view(np.uint8).tolist()


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_pair_gives_the_fake_quants_bits(name: str, dtype: torch.dtype) -> None:
    x = spread(6, 32).to(dtype)
    scale, point = symmetric_qparams(x, 0, 1, element=name)
    whole = PER_CHANNEL(x, scale, point, 0, -1, 1, rounding="divide", element=name)
    assert torch.equal(whole, ops.fake_quantize_float(x, scale, name, axis=0))
    code = quantize_elements(x, scale, name, axis=0)
    assert code.dtype == torch.uint8 and code.shape == x.shape
    if dtype != torch.float64:  # whose product is float64
        assert torch.equal(dequantize_elements(code, scale, name, axis=0, dtype=dtype), whole)


@each_format
def test_one_scale_is_that_of_the_range(name: str) -> None:
    x = spread(4, 16)
    scale, point = affine_qparams(x.min().reshape(1), x.max().reshape(1), -1, 1, True, element=name)
    assert scale.item() == np.float32(x.abs().max().item()) / np.float32(FLOAT_FORMATS[name].max)
    y = PER_TENSOR(x, scale, point, -1, 1, rounding="divide", element=name)
    assert torch.equal(y, ops.fake_quantize_float(x, scale, name))


@each_format
def test_rows_with_powers_of_two_are_mx(name: str) -> None:
    x = spread(8, 64)
    assert torch.equal(in_rows(x, 32, name, "e8m0"), ops.fake_quantize_mx(x, {-1: 32}, name))


@pytest.mark.parametrize("amax", [None, 2.0, 1e-3])
def test_rows_with_float_scales_are_nvfp4(amax: float | None) -> None:
    x = spread(8, 64)
    given_amax = None if amax is None else torch.tensor([amax])
    assert torch.equal(in_rows(x, 16, "e2m1", "e4m3", given_amax), ops.fake_quantize_nvfp4(x, given_amax))


def test_a_scale_of_zero_gives_zeros() -> None:
    x = torch.tensor([1.0, -3.0, float("inf")])
    y = PER_TENSOR(x, torch.zeros(1), torch.zeros(1, dtype=torch.int32), -6, 6, rounding="divide", element="e2m1")
    assert y.tolist() == [0, 0, 0]


@pytest.mark.parametrize("axis", [None, 0])
def test_a_scale_learns_as_in_lsq(axis: int | None) -> None:
    """Against the rule written out in float64: round(x / s) − x / s inside, ±max outside."""
    x = spread(6, 32)[[0, 3, 4, 5]]
    scale = (x.abs().amax(1) / 9 if axis == 0 else x.abs().amax().reshape(1) / 9).requires_grad_()
    point = torch.zeros(scale.shape, dtype=torch.int32)
    options = {"rounding": "divide", "element": "e2m1", "scale_gradient": 0.25}
    y = (
        PER_TENSOR(x, scale, point, -6, 6, **options)
        if axis is None
        else PER_CHANNEL(x, scale, point, 0, -6, 6, **options)
    )
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = scale.detach().double().reshape(-1, 1)
    steps = (x / scale.detach().reshape(-1, 1)).double()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    nearest = grid[(steps.abs().unsqueeze(-1) - grid).abs().argmin(-1)] * steps.sign()
    slope = torch.where(steps.abs() <= 6, nearest - steps, 6 * steps.sign())
    expected = (dy.double() * slope * 0.25).sum(1) if axis == 0 else (dy.double() * slope * 0.25).sum().reshape(1)
    assert wide.shape[0] == expected.shape[0] and scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    x = torch.ones(4, 4)
    with pytest.raises(InvalidArgument, match=r"`scale_format` must be one of 'e8m0', 'e4m3': got 'e5m2'."):
        block_qparams(x, None, 6, "e5m2", element="e2m1")
    with pytest.raises(InvalidArgument, match=r"`format` must name a floating-point format: got 'e9m9'."):
        quantize_elements(x, torch.ones(1), "e9m9")
    with pytest.raises(InvalidArgument, match=r"`scale` must have one element without an axis: got shape \(4,\)."):
        quantize_elements(x, torch.ones(4), "e4m3")
    with pytest.raises(
        InvalidArgument, match=r"`code` must be uint8: got torch.int32. `quantize_elements` gives that."
    ):
        dequantize_elements(torch.zeros(4, dtype=torch.int32), torch.ones(1), "e4m3")
