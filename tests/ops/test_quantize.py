"""Codes in real integer dtypes: the same numbers as fake-quantize, gradients of scales, 4-bit packing, errors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor

from fxquant.ops.fake_quantize import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from fxquant.ops.int4 import pack_int4, unpack_int4
from fxquant.ops.quantize import (
    dequantize_per_channel,
    dequantize_per_tensor,
    quantize_per_channel,
    quantize_per_tensor,
)
from tests.ops.cases import FLOATS
from tests.ops.oracle import assert_same_bits, hard_values

FORMATS = {
    "s8": (torch.int8, -128, 127),
    "s8 narrow": (torch.int8, -127, 127),
    "u8": (torch.uint8, 0, 255),
    "s4 in int8": (torch.int8, -8, 7),
    "s16": (torch.int16, -32768, 32767),
    "u16": (torch.uint16, 0, 65535),
    "s24": (torch.int32, -(2**23), 2**23 - 1),
    "s32": (torch.int32, -(2**31), 2**31 - 1),
}
SCALES = (1e-8, 1.17e-3, 0.1, 1.0, 3.0, 1e8)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_there_and_back_per_tensor_is_fake_quantize(
    form: tuple[torch.dtype, int, int], dtype: torch.dtype, rounding: str
) -> None:
    integer, low, high = form
    for scale in (*SCALES, -0.1, 0.0, NAN):
        x = hard_values(0.1 if scale != scale or scale <= 0 else scale, low, high, dtype)
        for point in (low, (low + high) // 2, high):
            expected = fake_quantize_per_tensor_affine(x, scale, point, low, high, rounding=rounding)
            code = quantize_per_tensor(x, scale, point, low, high, integer, rounding=rounding)
            assert code.dtype == integer and code.shape == x.shape
            assert_same_bits(dequantize_per_tensor(code, scale, point, dtype), expected)
            qparams = torch.tensor([scale]), torch.tensor([point], dtype=torch.int32)
            same = quantize_per_tensor(x, *qparams, low, high, integer, rounding=rounding)
            assert torch.equal(same.to(torch.int64), code.to(torch.int64))
            assert_same_bits(dequantize_per_tensor(same, *qparams, dtype), expected)


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_there_and_back_per_channel_is_fake_quantize(
    form: tuple[torch.dtype, int, int], dtype: torch.dtype, rounding: str
) -> None:
    integer, low, high = form
    scale = torch.tensor(SCALES)
    point = torch.tensor([low, high, (low + high) // 2, low, high, low], dtype=torch.int32)
    rows = torch.stack([hard_values(s, low, high, dtype) for s in SCALES])
    for axis, x in ((0, rows), (1, rows.t())):
        expected = fake_quantize_per_channel_affine(x, scale, point, axis, low, high, rounding=rounding)
        code = quantize_per_channel(x, scale, point, axis, low, high, integer, rounding=rounding)
        if rounding == "divide" or dtype in (torch.float32, torch.float64):
            assert_same_bits(dequantize_per_channel(code, scale, point, axis, dtype), expected)
        else:  # fake-quantize takes torch's double product here; the codes are the same
            view = [1, 1]
            view[axis] = -1
            wide = code.to(torch.float32).double() - point.double().view(view)
            assert_same_bits((wide * scale.double().view(view)).to(dtype), expected)


def test_floating_zero_points_per_channel() -> None:
    scale, point = torch.tensor([0.1, 0.37]), torch.tensor([2.375, -1.25])
    x = torch.stack([hard_values(s, -8, 7) for s in (0.1, 0.37)])
    code = quantize_per_channel(x, scale, point, 0, -8, 7, rounding="reciprocal")
    expected = fake_quantize_per_channel_affine(x, scale, point, 0, -8, 7)
    assert_same_bits(dequantize_per_channel(code, scale, point, 0), expected)


def test_bfloat16_scales() -> None:
    scale, point = torch.tensor([0.1, 3.0]).bfloat16(), torch.tensor([1, -3], dtype=torch.int32)
    x = torch.stack([hard_values(s, -8, 7) for s in (0.1, 3.0)])
    code = quantize_per_channel(x, scale, point, 0, -8, 7)
    assert torch.equal(code, quantize_per_channel(x, scale.float(), point, 0, -8, 7))
    back = dequantize_per_channel(code, scale, point, 0)
    assert_same_bits(back, fake_quantize_per_channel_affine(x, scale, point, 0, -8, 7, rounding="divide"))


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_specials(form: tuple[torch.dtype, int, int], rounding: str) -> None:
    integer, low, high = form
    x = torch.tensor([NAN, -INF, INF, -1e30, 1e30, 0.0, -0.0])
    point = max(low, min(high, 3))
    code = quantize_per_tensor(x, 1.0, point, low, high, integer, rounding=rounding)
    assert code.tolist() == [low, low, high, low, high, point, point]
    qparams = torch.ones(1), torch.tensor([point], dtype=torch.int32)
    code = quantize_per_channel(x[None], *qparams, 0, low, high, integer, rounding=rounding)
    wraps = low if rounding == "reciprocal" else high  # what int64 cannot hold, as in torch
    assert code.tolist() == [[low, low, wraps, low, wraps, point, point]]


def test_int32_ends() -> None:
    x = torch.tensor([2147483520.0, 2147483648.0, -2147483648.0, -2147483904.0, 2.0**24 + 2])
    code = quantize_per_tensor(x, 1.0, 0, -(2**31), 2**31 - 1, torch.int32)
    assert code.tolist() == [2147483520, 2**31 - 1, -(2**31), -(2**31), 2**24 + 2]
    assert dequantize_per_tensor(code, 1.0, 0).tolist() == [2147483520.0, 2.0**31, -(2.0**31), -(2.0**31), 2.0**24 + 2]


def test_integers_carry_no_gradient() -> None:
    x = torch.randn(3, requires_grad=True)
    assert not quantize_per_tensor(x, 0.1, 0, -8, 7).requires_grad
    assert not dequantize_per_tensor(torch.ones(3, dtype=torch.int8), 0.1, 0).requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_scale(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    code = torch.randint(-128, 128, (6, 7), generator=generator).to(torch.int8)
    grad = torch.randn(6, 7, generator=generator).to(dtype)
    scale = torch.tensor([0.3]).to(scale_dtype).requires_grad_()
    point = torch.tensor([5], dtype=torch.int32)
    (got,) = torch.autograd.grad(dequantize_per_tensor(code, scale, point, dtype), scale, grad)
    assert_same_bits(got, (grad.double() * (code.double() - 5)).sum().reshape(1).to(scale_dtype))

    scales = torch.linspace(0.1, 1, 7).to(scale_dtype).requires_grad_()
    points = torch.arange(7, dtype=torch.int32)
    (got,) = torch.autograd.grad(dequantize_per_channel(code, scales, points, 1, dtype), scales, grad)
    assert_same_bits(got, (grad.double() * (code.double() - points)).sum(0).to(scale_dtype))


def test_gradient_of_floating_zero_points() -> None:
    """Against the derivative of the equation in double."""
    code = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    scale, point = torch.tensor([0.5, 0.3, 2.0]), torch.tensor([0.5, 1.25, -3.0])
    grad = torch.linspace(-1, 2, 12).reshape(3, 4)

    def gradients(function: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, grad.to(y.dtype))

    got = gradients(lambda s, z: dequantize_per_channel(code, s, z, 0), scale, point)
    expected = gradients(lambda s, z: (code.double() - z[:, None]) * s[:, None], scale.double(), point.double())
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other.float())


def test_scales_of_a_vector_per_element() -> None:
    """A sum over no dimension: each element is its own slice."""
    scale = torch.tensor([0.5, 2.0]).requires_grad_()
    code, point = torch.tensor([3, -2], dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    (got,) = torch.autograd.grad(dequantize_per_channel(code, scale, point, 0), scale, torch.tensor([1.0, 10.0]))
    assert got.tolist() == [3.0, -20.0]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    signed=st.booleans(),
    dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
    seed=st.integers(0, 999),
)
def test_packing_there_and_back(lengths: list[int], signed: bool, dtype: torch.dtype, seed: int) -> None:
    low = -8 if signed else 0
    code = torch.randint(low, low + 16, lengths, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_int4(code)
    assert packed.dtype == torch.uint8 and packed.shape == (*lengths[:-1], -(-lengths[-1] // 2))
    back = unpack_int4(packed, lengths[-1], signed)
    assert back.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(back.to(dtype), code) and back.is_contiguous()


@pytest.mark.parametrize("signed", [True, False], ids=["int4", "uint4"])
@pytest.mark.parametrize("length", [1, 8, 15])
def test_onnx_reads_what_was_packed(length: int, signed: bool) -> None:
    low = -8 if signed else 0
    code = torch.randint(low, low + 16, (length,), generator=torch.Generator().manual_seed(length)).to(torch.int8)
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    proto = onnx.TensorProto(data_type=kind, dims=[length], raw_data=pack_int4(code).numpy().tobytes())
    values = numpy_helper.to_array(proto)
    assert values.astype(np.int8).tolist() == code.tolist()
    written = numpy_helper.from_array(code.numpy().astype(ml_dtypes.int4 if signed else ml_dtypes.uint4))
    read = torch.frombuffer(bytearray(written.raw_data), dtype=torch.uint8)
    assert unpack_int4(read, length, signed).tolist() == code.tolist()


@pytest.mark.skipif(not hasattr(torch, "int4"), reason="this torch has no name for 4-bit dtypes")
@pytest.mark.parametrize("signed", [True, False], ids=["int4", "uint4"])
def test_4_bit_dtypes_come_packed(signed: bool) -> None:
    name, low, high = ("int4", -8, 7) if signed else ("uint4", 0, 15)
    dtype, held = getattr(torch, name), torch.int8 if signed else torch.uint8
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    code = quantize_per_tensor(x, 0.2, 3, low, high, held)
    assert torch.equal(quantize_per_tensor(x, 0.2, 3, low, high, dtype), pack_int4(code))
    scale, point = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 3, 7], dtype=torch.int32)
    code = quantize_per_channel(x, scale, point, 0, low, high, held)
    packed = quantize_per_channel(x, scale, point, 0, low, high, dtype)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 3)
    assert torch.equal(unpack_int4(packed, 5, signed), code)


def test_packing_under_vmap_keeps_rows_apart() -> None:
    code = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    assert torch.equal(torch.vmap(pack_int4)(code), torch.stack([pack_int4(row) for row in code]))
    with pytest.raises(RuntimeError, match=r"`packed` must have a last axis|`code` must have a last axis"):
        torch.vmap(pack_int4)(code[0])


S, Z = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
SC, ZC = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int32)
CODE = torch.zeros(2, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: quantize_per_tensor(x, 0.1, 0, 0, 255),
            r"must fit torch.int8: got \[0, 255\], not in \[-128, 127\]",
        ),
        (lambda x: quantize_per_tensor(x, S, Z, -1, 3, torch.uint8), r"must fit torch.uint8: got \[-1, 3\]"),
        (lambda x: quantize_per_channel(x, SC, ZC, 1, 0, 70000, torch.uint16), r"must fit torch.uint16"),
        (
            lambda x: quantize_per_tensor(x, 0.1, 0, 0, 15, torch.int64),
            r"`dtype` must be one of .*int32.*: got torch.int64",
        ),
        (lambda x: quantize_per_tensor(x, 0.1, 9, 0, 7), r"`zero_point` must be between .*: got 9, not in \[0, 7\]"),
        (lambda x: quantize_per_channel(x, SC, ZC - 1, 1, 0, 7), r"`zero_point` must be between .*: got -1"),
        (lambda x: quantize_per_tensor(x, 0.1, 0, 5, 4), "`quant_min` should be less than or equal to `quant_max`"),
        (lambda x: quantize_per_tensor(x, S, 0, 0, 7), "both be numbers or both be tensors"),
        (lambda x: quantize_per_tensor(x, 0.1, 0, 0, 7, rounding="up"), "`rounding` must be one of"),
        (lambda x: quantize_per_tensor(x.int(), 0.1, 0, 0, 7), "`input` must be a floating-point tensor: got Int"),
        (lambda x: quantize_per_channel(x, SC, ZC.float(), 1, 0, 7), "`zero_point` must be an integer tensor with"),
        (lambda x: dequantize_per_tensor(x, 0.1, 0), "`code` must have one of the dtypes .*: got torch.float32"),
        (lambda x: dequantize_per_tensor(CODE, S, 0), "both be numbers or both be tensors"),
        (lambda x: dequantize_per_tensor(CODE, 0.1, 0, torch.int32), "`dtype` must be one of .*: got torch.int32"),
        (lambda x: dequantize_per_tensor(CODE, SC, Z), "scale must be a 1-element tensor"),
        (lambda x: dequantize_per_channel(CODE, S, Z, 1), "not consistent with code tensor: got 1 of each for 3"),
        (lambda x: dequantize_per_channel(CODE, SC, ZC, -1), "`axis` must be between 0 and .* of code: got -1 of 2"),
        (lambda x: pack_int4(x), "`code` must have one of the dtypes"),
        (lambda x: pack_int4(torch.tensor([-9])), r"`code` must hold 4-bit codes.*: got -9 to -9"),
        (lambda x: pack_int4(torch.tensor([-1, 8])), r"got -1 to 8"),
        (lambda x: pack_int4(torch.tensor(3)), "`code` must have a last axis"),
        (lambda x: unpack_int4(CODE, 3), "`packed` must be a uint8 tensor: got torch.int8"),
        (lambda x: unpack_int4(CODE.view(torch.uint8), 4), "`length` must be .*: got 4 for 3 bytes"),
        (lambda x: unpack_int4(CODE.view(torch.uint8), 7), "`length` must be .*: got 7 for 3 bytes"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(2, 3))


def test_4_bits_need_an_axis() -> None:
    if hasattr(torch, "int4"):
        with pytest.raises(RuntimeError, match="`input` must have a last axis, where two codes share a byte"):
            quantize_per_tensor(torch.tensor(0.5), 0.1, 0, -8, 7, torch.int4)


def test_no_such_axis() -> None:
    with pytest.raises(IndexError, match="`axis` must be between 0 and number of dimensions of code: got 2 of 2"):
        dequantize_per_channel(CODE, SC, ZC, 2)
