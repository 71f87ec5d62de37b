"""Rounding "reciprocal" equals torch's CPU kernels bit for bit, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.ops import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from tests.ops.oracle import FORMATS, assert_same_bits, hard_values

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Builds of torch without a fused multiply-add round a product before they add a floating zero point; ours never does.
FUSED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
SCALES = (1e-8, 1.17e-3, 0.1, 1.0, 3.0, 1e8)


def both(ours, torchs, x: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Compares values and gradients; the incoming gradient has infinities and NaN too."""
    grad = torch.linspace(-2, 2, x.numel(), dtype=torch.float64).reshape(x.shape).to(x.dtype)
    grad.view(-1)[::7] = float("inf")
    grad.view(-1)[::11] = float("nan")
    results = []
    for function in (ours, torchs):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (dx,) = torch.autograd.grad(y, leaf, grad)
        results.append((y.detach(), dx))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", FORMATS.values(), ids=FORMATS)
def test_per_tensor(limits: tuple[int, int], dtype: torch.dtype) -> None:
    low, high = limits
    for scale in SCALES:
        x = hard_values(scale, low, high, dtype)
        for point in (low, (low + high) // 2, high):
            args = (scale, point, low, high)
            both(
                lambda t, a=args: fake_quantize_per_tensor_affine(t, *a),
                lambda t, a=args: torch.fake_quantize_per_tensor_affine(t, *a),
                x,
            )


@pytest.mark.parametrize("point_dtype", [torch.int32, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_tensor_with_tensor_qparams(dtype: torch.dtype, scale_dtype: torch.dtype, point_dtype: torch.dtype) -> None:
    for number in (1.17e-3, 0.3, 7.0):
        scale, point = torch.tensor([number], dtype=scale_dtype), torch.tensor([3.4]).to(point_dtype)
        x = hard_values(scale.item(), 0, 15, dtype)
        both(
            lambda t, s=scale, z=point: fake_quantize_per_tensor_affine(t, s, z, 0, 15),
            lambda t, s=scale, z=point: torch.fake_quantize_per_tensor_affine(t, s, z, 0, 15),
            x,
        )


@pytest.mark.parametrize("point_dtype", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", FORMATS.values(), ids=FORMATS)
def test_per_channel(limits: tuple[int, int], dtype: torch.dtype, point_dtype: torch.dtype) -> None:
    if point_dtype == torch.float32 and not FUSED:
        pytest.skip("this build of torch rounds the product of a floating zero point")
    low, high = limits
    scale = torch.tensor(SCALES)
    middle = (low + high) / 2 + (0.375 if point_dtype.is_floating_point else 0)
    point = torch.full((len(SCALES),), middle).to(point_dtype)
    rows = torch.stack([hard_values(s, low, high, dtype) for s in SCALES])
    for axis, x in ((0, rows), (1, rows.t().contiguous()), (1, rows.t()[None, :, :].transpose(1, 2))):
        both(
            lambda t, a=axis: fake_quantize_per_channel_affine(t, scale, point, a, low, high),
            lambda t, a=axis: torch.fake_quantize_per_channel_affine(t, scale, point, a, low, high),
            x,
        )


@pytest.mark.skipif(not FUSED, reason="this build of torch rounds the product of a floating zero point")
def test_a_floating_zero_point_is_added_with_one_rounding() -> None:
    """x / s + z lies 2⁻⁶⁴ below the middle of two floats; rounded to double on the way, it would round up, over .5."""
    x, scale = torch.tensor([[(2**23 + 1) * 2.0**-41]]), torch.tensor([1 + 2.0**-23])
    for sign in (1, -1):
        point = torch.tensor([sign * (65.5 - 2.0**-17)])
        low, high = (0, 255) if sign == 1 else (-255, 0)
        both(
            lambda t, z=point, a=low, b=high: fake_quantize_per_channel_affine(t, scale, z, 0, a, b),
            lambda t, z=point, a=low, b=high: torch.fake_quantize_per_channel_affine(t, scale, z, 0, a, b),
            sign * x,
        )
    y = fake_quantize_per_channel_affine(x, scale, torch.tensor([65.5 - 2.0**-17]), 0, 0, 255)
    assert y.item() == pytest.approx(65 - 65.5, abs=1e-4)  # 0.5 with the code 66


def test_a_float16_zero_point_is_added_with_two() -> None:
    """torch rounds the product, 1.49999994 to 1.5, before it adds a zero point of this dtype, and only of this one."""
    x, scale = torch.tensor([[62976.0]]), torch.tensor([41984.0])
    for dtype, code in ((torch.float16, 0), (torch.float32, -1))[: 1 + FUSED]:
        point = torch.tensor([-2.0], dtype=dtype)
        both(
            lambda t, z=point: fake_quantize_per_channel_affine(t, scale, z, 0, -2, 1),
            lambda t, z=point: torch.fake_quantize_per_channel_affine(t, scale, z, 0, -2, 1),
            x,
        )
        assert fake_quantize_per_channel_affine(x, scale, point, 0, -2, 1).item() == (code + 2) * 41984.0


def test_bfloat16_scales_per_channel_fail_in_torch_alone() -> None:
    """Its defect: the argument check lets them pass, the CPU kernel then fails an internal assertion."""
    x, scale, point = torch.randn(2, 4), torch.tensor([0.1, 0.3]).bfloat16(), torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        torch.fake_quantize_per_channel_affine(x, scale, point, 0, -8, 7)
    both(
        lambda t: fake_quantize_per_channel_affine(t, scale, point, 0, -8, 7),
        lambda t: torch.fake_quantize_per_channel_affine(t, scale.float(), point, 0, -8, 7),
        x,
    )


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf"), 1e-45])
def test_scales_that_mean_nothing_follow_torch(scale: float) -> None:
    x = hard_values(0.1, -128, 127)
    for s, z in ((torch.tensor([scale]), torch.tensor([5], dtype=torch.int32)),):
        both(
            lambda t, s=s, z=z: fake_quantize_per_tensor_affine(t, s, z, -128, 127),
            lambda t, s=s, z=z: torch.fake_quantize_per_tensor_affine(t, s, z, -128, 127),
            x,
        )


def test_what_int64_cannot_hold_wraps_per_channel_only() -> None:
    x, scale, zero = (
        torch.tensor([[float("inf"), 1e30, 9.3e18, 9.2e18]]),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int32),
    )
    per_channel = fake_quantize_per_channel_affine(x, scale, zero, 0, -8, 7)
    assert per_channel.tolist() == [[-8, -8, -8, 7]]
    assert fake_quantize_per_tensor_affine(x, 1.0, 0, -8, 7).tolist() == [[7, 7, 7, 7]]
    divided = fake_quantize_per_channel_affine(x, scale, zero, 0, -8, 7, rounding="divide")
    assert divided.tolist() == [[7, 7, 7, 7]]
