"""What every op of the library keeps: opcheck, layouts, gradients, errors, dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import numerics
from fxquant.ops import (
    bind,
    dequantize_affine,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    quantize_dequantize,
)
from fxquant.ops.fake_quantize import BACKWARD, PER_CHANNEL_BACKWARD, PER_TENSOR_BACKWARD
from fxquant.ops.marks import BIND
from tests.ops.oracle import assert_same_bits

S, Z = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
SC, ZC = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2], dtype=torch.int32)
LOW, HIGH = torch.tensor([-1.0]), torch.tensor([2.0])


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def layouts() -> dict[str, Tensor]:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    return {
        "empty": torch.empty(0, 3, 4),
        "no channels": torch.empty(2, 0),
        "scalar": torch.tensor(0.234),
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "sliced": x[:, ::2, 1:, ::3],
        "expanded": torch.randn(2, 1, 4).expand(2, 3, 4),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    x = layouts()[name]
    args = (0.1, 3, 0, 15)
    assert_same_bits(fake_quantize_per_tensor_affine(x, *args), torch.fake_quantize_per_tensor_affine(x, *args))
    if x.dim() < 2:
        return
    count = x.shape[1]
    scale, point = torch.linspace(0.1, 1, count), torch.arange(count, dtype=torch.int32)
    y = fake_quantize_per_channel_affine(x, scale, point, 1, 0, 15)
    if x.numel():
        assert_same_bits(y, torch.fake_quantize_per_channel_affine(x.contiguous(), scale, point, 1, 0, 15))
    assert y.shape == x.shape
    if name == "channels last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    values=st.lists(st.floats(width=32), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    bits=st.integers(2, 16),
    signed=st.booleans(),
    rounding=st.sampled_from(["divide", "reciprocal"]),
    scale=st.floats(2**-20, 2**20, width=32),
)
def test_the_equation(
    shape: list[int],
    values: list[float],
    dtype: torch.dtype,
    bits: int,
    signed: bool,
    rounding: str,
    scale: float,
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    count = int(torch.tensor(shape).prod())
    x = torch.tensor((values * (count // len(values) + 1))[:count], dtype=torch.float64).to(dtype).reshape(shape)
    y = fake_quantize_per_tensor_affine(x, scale, 0, low, high, rounding=rounding)
    assert y.shape == x.shape and y.dtype == dtype and not y.isnan().any()
    wide = x if dtype == torch.float64 else x.float()
    s = torch.tensor(scale)
    code = (wide / s if rounding == "divide" else wide * (1 / s)).double().round().nan_to_num(nan=low).clamp(low, high)
    assert torch.equal(y, (code.float() * s).to(dtype))
    again = fake_quantize_per_tensor_affine(y, scale, 0, low, high, rounding=rounding)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(again, y)


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_is_the_clipped_straight_through_estimator(dtype: torch.dtype, rounding: str) -> None:
    """The derivative of x clamped to the span of the codes, rounding taken for the identity."""
    scale, point, low, high = 0.25, 3, 0, 15
    x = torch.linspace(-3, 5, 641, dtype=dtype).requires_grad_()
    grad = torch.randn(641, generator=torch.Generator().manual_seed(0)).to(dtype)
    (got,) = torch.autograd.grad(
        fake_quantize_per_tensor_affine(x, scale, point, low, high, rounding=rounding), x, grad
    )
    code = (x.detach().double() / scale).round() + point
    assert torch.equal(got, grad * ((code >= low) & (code <= high)))


def test_double_backward() -> None:
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    outside = torch.tensor([-5.0, 0.3, 5.0], dtype=torch.float64).requires_grad_()
    for y, leaf_ in (
        (fake_quantize_per_tensor_affine(outside, 0.1, 3, 0, 15), outside),
        (fake_quantize_per_tensor_affine(outside, S, Z, 0, 15), outside),
        (fake_quantize_per_channel_affine(x, SC, ZC, 1, -15, 15), x),
    ):
        (first,) = torch.autograd.grad((y**3).sum(), leaf_, create_graph=True)
        (mask,) = torch.autograd.grad(y.sum(), leaf_, retain_graph=True)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(first, 3 * y.detach() ** 2 * mask)
        (second,) = torch.autograd.grad(first.sum(), leaf_)
        torch.testing.assert_close(second, 6 * y.detach() * mask)


def test_gradgradcheck_of_the_backward_ops() -> None:
    x = torch.tensor([-5.0, 0.31, 5.0], dtype=torch.float64)
    grad = torch.randn(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: PER_TENSOR_BACKWARD(g, x, S, Z, 0, 15), (grad,))
    rows, grads = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: PER_CHANNEL_BACKWARD(g, rows, SC, ZC, 1, 0, 15), (grads,))
    assert len(BACKWARD) == 2


def test_no_gradient_to_scale_and_zero_point() -> None:
    scale = S.clone().requires_grad_()
    fake_quantize_per_tensor_affine(leaf(3), scale, Z, 0, 15).sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize_per_tensor_affine(x, 0.1, 0, 5, 4), r"`quant_min` should be less than or equal"),
        (lambda x: fake_quantize_per_tensor_affine(x, S, Z, 5, 4), r"got 5 and 4"),
        (lambda x: fake_quantize_per_tensor_affine(x, 0.1, 16, 0, 15), r"`zero_point` must be between .*: got 16"),
        (lambda x: fake_quantize_per_tensor_affine(x, S, 0, 0, 15), "both be numbers or both be tensors"),
        (
            lambda x: fake_quantize_per_tensor_affine(x, SC, Z, 0, 15),
            r"scale must be a 1-element tensor: got shape \(3,\)",
        ),
        (lambda x: fake_quantize_per_tensor_affine(x, S.double(), Z, 0, 15), "Scale must be Float or BFloat16"),
        (
            lambda x: fake_quantize_per_tensor_affine(x, S, Z.double(), 0, 15),
            r"Zero-point must be Int32, Float or Half, found Double",
        ),
        (lambda x: fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 15, rounding="up"), r"`rounding` must be one of"),
        (
            lambda x: fake_quantize_per_channel_affine(x, S, Z, 1, 0, 15),
            "not consistent with input tensor: got 1 of each for 3 slices of axis 1",
        ),
        (lambda x: fake_quantize_per_channel_affine(x, SC, ZC, 2, 0, 15), "`axis` must be between 0 and.*got 2 of 2"),
        (lambda x: fake_quantize_per_channel_affine(x, SC, ZC, -1, 0, 15), "`axis` must be between 0"),
        (lambda x: fake_quantize_per_channel_affine(x, SC[None], ZC, 1, 0, 15), "scale should be a 1-D tensor"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=message):
        call(torch.zeros(2, 3))


def test_qdq_ops() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(
        quantize_dequantize(x, 0.1, 3, 0, 15, "site"),
        fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15, rounding="divide"),
    )
    code = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert torch.equal(dequantize_affine(code, SC, ZC, 1), (code.float() - ZC) * SC)
    assert torch.equal(dequantize_affine(code, S, Z), (code.float() - 3) * S)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.zeros(1, 2, dtype=torch.uint8)
    blocks = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert dequantize_affine(blocks, scale, zero, 1, 2).tolist() == [[0.5, 1.0, 6.0, 8.0]]
    assert torch.equal(
        dequantize_affine(blocks.t(), scale.t(), zero.t(), 0, 2).t(), dequantize_affine(blocks, scale, zero, 1, 2)
    )


def test_bind_returns_nothing_and_survives_tracing() -> None:
    assert bind("key", [], []) is None
    graph = torch.fx.symbolic_trace(lambda x: (BIND("key", [1], [x]), x + 1)[1])
    graph.graph.eliminate_dead_code()
    assert any(node.target is BIND for node in graph.graph.nodes)


def test_clip_mask_excludes_nan() -> None:
    code = torch.tensor([float("nan"), -1.0, 0.0, 15.0, 16.0])
    assert numerics.clip_mask(code, 0, 15).tolist() == [False, False, True, True, False]
