"""Inputs that stress a quantizer, and what must be equal to what."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {
    "s2": (-2, 1),
    "u2": (0, 3),
    "s4 narrow": (-7, 7),
    "u4": (0, 15),
    "s8": (-128, 127),
    "s8 narrow": (-127, 127),
    "u8": (0, 255),
    "s16": (-32768, 32767),
    "u16": (0, 65535),
}
SPECIALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-39, 1e30, -1e30, 3.4e38, -3.4e38)


def hard_values(scale: float, low: int, high: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Specials, ties and their neighbours around both ends of the format, and a spread of plain values."""
    ends = torch.tensor([low, low + 1, -1, 0, 1, 2, 3, high - 1, high], dtype=torch.float64)
    ties = torch.cat([ends + d for d in (-0.5, -0.25, 0.0, 0.5, 1.0)]) * scale
    ties = ties.to(dtype)
    near = [ties] if dtype == torch.float64 else [ties, *(torch.nextafter(ties, ties + d) for d in (1, -1))]
    spread = (
        torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (high - low) * scale / 3
    )
    return torch.cat([torch.tensor(SPECIALS).to(dtype), *near, spread.to(dtype)])


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Equal values, NaN at the same places, and zeros of the same sign."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype.itemsize == 1 and got.is_floating_point():
        got, expected = got.float(), expected.float()  # float8 has next to no operators
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got) & ~got.isnan(), torch.signbit(expected) & ~expected.isnan())
