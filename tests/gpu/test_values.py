"""Ten million values and more against torch's CPU kernels, by every path; all patterns of the half types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops.saved import CLIP_MASK
from tests.gpu.harness import kernels
from tests.ops.census import FLOAT_POINTS, Group, Row, census, formats, table

# Builds of torch without fused multiply-add round the product apart before a floating zero point is added.
FUSED = torch.backends.cpu.get_cpu_capability().startswith("AVX")


def differing(rows: Sequence[Row]) -> int:
    return sum(row.differing for row in rows if FUSED or row.kind != FLOAT_POINTS)


def test_no_bit_differs_in_1e7_values(path: str, device: str) -> None:
    every = formats()[::10] if device == "cuda" else formats()[::50]
    with kernels(path):
        rows = census(every, seed=2, device=device)
    assert sum(row.values for row in rows) >= (10**7 if device == "cuda" else 10**6)
    assert differing(rows) == 0, table(rows)


def test_no_bit_differs_compiled(device: str) -> None:
    def transform(group: Group) -> Group:
        return torch.compile(group, fullgraph=True) if device == "cuda" else group  # tests/ops compiles it for CPU

    chosen = [form for form in formats() if (form.low, form.high, form.point) == (-8, 7, 3)]
    rows = census(chosen, size=4, transform=transform, device=device)
    assert differing(rows) == 0, table(rows)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 of them."""
    return torch.arange(65536).to(torch.uint16).view(dtype)


OPS = torch.ops.fxquant
# x, scale, zero point, scale and zero point per row of 256 → result
CALLS: dict[str, Callable[..., Tensor]] = {
    "per tensor": lambda x, s, z, c: OPS.fake_quantize_per_tensor_affine(x, s, z, -128, 127),
    "divide": lambda x, s, z, c: OPS.fake_quantize_per_tensor_affine(x, s, z, -128, 127, rounding="divide"),
    "per channel": lambda x, s, z, c: OPS.fake_quantize_per_channel_affine(x.view(256, 256), *c, 0, -8, 7).view(-1),
    "codes": lambda x, s, z, c: OPS.quantize_per_tensor(x, s, z, 0, 255, torch.uint8),
    "mask": lambda x, s, z, c: CLIP_MASK(x, s, z, 0, 255, rounding="divide"),
    "e4m3": lambda x, s, z, c: OPS.fake_quantize_float(x, s, "e4m3"),
    "e2m1": lambda x, s, z, c: OPS.fake_quantize_float(x, s, "e2m1"),
}


def half(dtype: torch.dtype) -> Any:
    return pytest.param(dtype, id=str(dtype)[6:])


Every = Callable[..., list[Tensor]]


def assert_every_pattern(dtype: torch.dtype, device: str, transform: Callable[[Every], Every]) -> None:
    x = patterns(dtype)
    fixed = [torch.tensor([0.0371]), torch.tensor([5], dtype=torch.int32)]
    channels = [torch.logspace(-4, 2, 256), torch.zeros(256, dtype=torch.int32)]

    def every(x: Tensor, fixed: list[Tensor], channels: list[Tensor]) -> list[Tensor]:
        return [call(x, *fixed, channels) for call in CALLS.values()]

    expected = every(x, fixed, channels)
    got = transform(every)(x.to(device), [t.to(device) for t in fixed], [t.to(device) for t in channels])
    for name, one, other in zip(CALLS, got, expected, strict=True):
        unequal = (one.cpu() != other) & ~(one.cpu().isnan() & other.isnan())
        assert int(unequal.sum()) == 0, f"{name}: {int(unequal.sum())} of {x.numel()} differ"


@pytest.mark.parametrize("dtype", [half(torch.float16), half(torch.bfloat16)])
def test_every_pattern_of_a_half_type(dtype: torch.dtype, path: str, device: str) -> None:
    with kernels(path):
        assert_every_pattern(dtype, device, lambda every: every)


@pytest.mark.parametrize("dtype", [half(torch.float16), half(torch.bfloat16)])
def test_every_pattern_of_a_half_type_compiled(dtype: torch.dtype, device: str) -> None:
    assert_every_pattern(dtype, device, lambda every: torch.compile(every, fullgraph=True))
