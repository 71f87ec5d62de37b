"""Codes in integer dtypes and products of them, against Python's integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fxquant.numerics import integer
from tests.numerics.exact import nearest, product, total


def random_codes(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_nibbles_lie_in_pairs_the_first_one_low(length: int, signed: bool) -> None:
    low, high = (-8, 7) if signed else (0, 15)
    code = random_codes(low, high, 3, length)
    rows = []
    for row in code.tolist():
        nibbles = [value % 16 for value in row] + [0] * (length % 2)
        rows.append([nibbles[i] + 16 * nibbles[i + 1] for i in range(0, len(nibbles), 2)])
    packed = integer.pack_nibbles(code)
    assert packed.dtype == torch.uint8 and packed.tolist() == rows
    back = integer.unpack_nibbles(packed, length, signed)
    assert back.dtype == (torch.int8 if signed else torch.uint8) and back.tolist() == code.tolist()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_codes_are_those_of_floats(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
    x = torch.tensor([-1e30, -2.5, -0.5, 0.0, 0.5, 1.5, 2.5, 1e30, float("nan")])
    found = integer.quantize_per_tensor(x, torch.tensor(1.0), None, low, high, dtype, "divide")
    rounded = [-2, 0, 0, 0, 2, 2]
    assert found.dtype == dtype
    assert found.tolist() == [low, *(min(max(v, low), high) for v in rounded), high, low]


def test_channels_have_codes_of_their_own() -> None:
    x = torch.tensor([[0.5, 1.5, 30.0], [0.5, 1.5, 30.0]])
    scales, points = torch.tensor([0.5, 1.0]), torch.tensor([1, -1], dtype=torch.int32)
    found = integer.quantize_per_channel(x, scales, points, 0, -8, 7, torch.int8, "divide")
    assert found.tolist() == [[2, 4, 7], [-1, 1, 7]]
    back = integer.dequantize_per_channel(found, scales, points, 0, torch.float32)
    assert back.tolist() == [[0.5, 1.5, 3.0], [0.0, 2.0, 8.0]]


def test_a_floating_zero_point_keeps_its_fraction_by_channel_only() -> None:
    code = torch.tensor([[1, 2]], dtype=torch.int8)
    scale, point = torch.tensor([0.1]), torch.tensor([0.75])
    by_channel = integer.dequantize_per_channel(code, scale, point, 0, torch.float64)
    assert by_channel.tolist() == [[(1 - 0.75) * scale.double().item(), (2 - 0.75) * scale.double().item()]]
    whole = integer.dequantize_per_tensor(code, scale.reshape(()), point.reshape(()), torch.float32)
    assert whole.tolist() == [[product(1, scale.item()), product(2, scale.item())]]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_of_scales_are_sums_over_their_codes(axis: int | None) -> None:
    code = random_codes(-8, 7, 3, 4)
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    count = 1 if axis is None else code.shape[axis]
    scale, point = torch.linspace(0.1, 1.0, count), torch.linspace(-2.0, 2.0, count)
    scale, point = (scale.reshape(()), point.reshape(())) if axis is None else (scale, point)
    found = integer.dequantize_backward(grad, code, scale, point, axis)
    to_scale, to_point = [Fraction(0)] * count, [Fraction(0)] * count
    for i, row in enumerate(code.tolist()):
        for j, value in enumerate(row):
            at = 0 if axis is None else (i, j)[axis]
            dy, z = Fraction(grad[i, j].item()), Fraction(point.reshape(-1)[at].item())
            to_scale[at] += dy * (value - (int(z) if axis is None else z))
            to_point[at] -= dy * Fraction(scale.reshape(-1)[at].item())
    torch.testing.assert_close(
        found["scale"].reshape(-1), torch.tensor([float(v) for v in to_scale]), rtol=1e-6, atol=0
    )
    assert found["scale"].shape == scale.shape and ("zero_point" in found) == (axis is not None)
    if axis is not None:
        expected = torch.tensor([float(v) for v in to_point])
        torch.testing.assert_close(found["zero_point"], expected, rtol=1e-6, atol=0)


def test_gradients_of_a_scale_per_element() -> None:
    """No dimension is left to sum over, which torch would take for all."""
    code, grad = torch.tensor([1, -2, 3], dtype=torch.int8), torch.tensor([1.0, 10.0, 100.0])
    found = integer.dequantize_backward(grad, code, torch.ones(3), torch.zeros(3, dtype=torch.int32), 0)
    assert found["scale"].tolist() == [1.0, -20.0, 300.0] and "zero_point" not in found


ZEROS = {"none": (None, None), "lhs": (7, None), "rhs": (None, -3), "both": (7, -3)}


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("per_row", [False, True], ids=["tensors", "rows and columns"])
def test_products_of_codes(zeros: tuple[int | None, int | None], per_row: bool) -> None:
    """Sums exact in integers, then one product with the scales' product and one sum with the bias."""
    m, k, n = 3, 16, 8
    lhs, rhs = random_codes(-128, 127, m, k), random_codes(-127, 127, k, n, seed=1)
    rows, columns = (m, n) if per_row else (1, 1)
    scales = torch.linspace(0.01, 0.3, rows), torch.linspace(0.002, 0.7, columns)
    offsets = [
        None if z is None else torch.arange(z, z + c, dtype=torch.int32)
        for z, c in zip(zeros, (rows, columns), strict=True)
    ]
    bias = torch.linspace(-5.0, 5.0, n)
    found = integer.matmul(lhs, rhs, *scales, lhs_zero=offsets[0], rhs_zero=offsets[1], bias=bias)
    for i in range(m):
        for j in range(n):
            row, column = (i, j) if per_row else (0, 0)
            left = 0 if offsets[0] is None else int(offsets[0][row])
            right = 0 if offsets[1] is None else int(offsets[1][column])
            exact = sum((int(lhs[i, x]) - left) * (int(rhs[x, j]) - right) for x in range(k))
            scale = product(scales[0][row].item(), scales[1][column].item())
            assert found[i, j].item() == total(product(nearest(Fraction(exact)), scale), bias[j].item())


def test_products_in_half_types_are_rounded_at_the_end() -> None:
    lhs, rhs = random_codes(-128, 127, 2, 16), random_codes(-127, 127, 16, 8, seed=1)
    scales = torch.tensor([0.013]), torch.tensor([0.007])
    wide = integer.matmul(lhs, rhs, *scales)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(integer.matmul(lhs, rhs, *scales, dtype=dtype), wide.to(dtype))
