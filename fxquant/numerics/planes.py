"""Small integers and masks, several to a byte.

A dimension of n is cut into m = 8 / bits planes of n / m, and the planes are laid one over the other: bits
``bits·k … bits·(k + 1) − 1`` of byte j hold element ``k·n/m + j``. Neighbours in memory stay neighbours, so that
compiled code packs and unpacks whole vectors; pairs of neighbours in a byte would have to be shuffled.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_planes(values: Tensor, bits: int, dim: int) -> Tensor:
    """``[…, n, …]`` integers of ``bits`` bits, or bools, as ``[…, n·bits/8, …]`` bytes."""
    planes = values.unflatten(dim, (8 // bits, -1))
    total: Tensor | None = None
    for k in range(8 // bits):
        # In float32, which holds the sum exactly: with bytes, Inductor's C++ takes 1.27 ms where this takes 0.16.
        place = float(2 ** (bits * k))
        plane = planes.select(dim, k)
        plane = torch.where(plane, place, 0.0) if plane.dtype == torch.bool else plane.to(torch.float32) * place
        total = plane if total is None else total + plane
    assert total is not None
    return as_bytes(total)


def sum_masks(values: Tensor, dim: int) -> Tensor:
    """Bools as one sum over the planes, of which `as_bytes` gives what `pack_planes` does."""
    ones = [1] * (values.dim() - dim)
    place = torch.arange(8, dtype=torch.int32, device=values.device).view(-1, *ones)
    bits = torch.ones_like(place) << place
    return torch.where(values.unflatten(dim, (8, -1)), bits.to(torch.float32), 0.0).sum(dim)


def as_bytes(total: Tensor) -> Tensor:
    """Whole numbers of 0 … 255 in float32, as uint8."""
    return total.to(torch.uint8)  # not by way of integers, which C++ narrows one by one


def unpack_planes(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of `pack_planes`, as int32."""
    ones = [1] * (packed.dim() - dim)
    shift = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device).view(-1, *ones)
    wide = packed.to(torch.int32).unsqueeze(dim)
    return ((wide >> shift) & (2**bits - 1)).flatten(dim, dim + 1)
