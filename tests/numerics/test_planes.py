"""Bits laid in planes, against Python's integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.numerics import planes


def values_of(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


def packed_list(row: list[int], bits: int) -> list[int]:
    """Bits ``bits·k …`` of byte j hold element ``k·n/m + j``."""
    count = 8 // bits
    length = len(row) // count
    return [sum(row[k * length + j] << (bits * k) for k in range(count)) for j in range(length)]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_hold_an_element_of_each_plane(bits: int) -> None:
    values = values_of(bits, 3, 24)
    packed = planes.pack_planes(values, bits, 1)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_list(row, bits) for row in values.tolist()]
    back = planes.unpack_planes(packed, bits, 1)
    assert back.dtype == torch.int32 and back.tolist() == values.tolist()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_planes_of_any_dimension(dim: int) -> None:
    values = values_of(1, 8, 16, 24)
    moved = values.movedim(dim, -1)
    packed = planes.pack_planes(values, 1, dim)
    rows = [packed_list(row, 1) for row in moved.reshape(-1, moved.shape[-1]).tolist()]
    assert packed.movedim(dim, -1).reshape(len(rows), -1).tolist() == rows
    assert torch.equal(planes.unpack_planes(packed, 1, dim), values.to(torch.int32))


@pytest.mark.parametrize("dim", [0, 1])
def test_masks_as_one_sum(dim: int) -> None:
    """What compiled code computes in place of eight selected planes."""
    mask = values_of(1, 8, 16) > 0
    expected = planes.pack_planes(mask, 1, dim)
    assert torch.equal(expected, planes.pack_planes(mask.to(torch.uint8), 1, dim))
    assert torch.equal(planes.as_bytes(planes.sum_masks(mask, dim)), expected)


def test_every_byte_comes_back() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(planes.as_bytes(every.float()), every)
    for bits in (1, 2, 4):
        assert torch.equal(planes.pack_planes(planes.unpack_planes(every, bits, 0), bits, 0), every)
