"""``fxquant::{pack,unpack}_int4``: 4-bit codes in pairs, for torch has no tensors of them that compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import integer
from fxquant.ops.checks import can_read, dtype_names
from fxquant.ops.library import define

_PACKABLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_last_axis(name: str, tensor: Tensor) -> None:
    """Two codes share a byte of it."""
    if tensor.dim() == 0:
        raise RuntimeError(f"`{name}` must have a last axis, where two codes share a byte: got a 0-d tensor.")


def _pack(code: Tensor) -> Tensor:
    if code.dtype not in _PACKABLE:
        raise RuntimeError(f"`code` must have one of the dtypes {dtype_names(_PACKABLE)}: got {code.dtype}.")
    check_last_axis("code", code)
    return integer.pack_nibbles(code)


def _check_nibbles(code: Tensor) -> None:
    if code.dtype not in _PACKABLE or not can_read(code):
        return
    low, high = (int(end) for end in torch.aminmax(code))
    if low < -8 or high > 15 or (low < 0 and high > 7):
        raise RuntimeError(f"`code` must hold 4-bit codes, all in [-8, 7] or all in [0, 15]: got {low} to {high}.")


def _unpack(packed: Tensor, length: int, signed: bool = True) -> Tensor:
    if packed.dtype != torch.uint8:
        raise RuntimeError(f"`packed` must be a uint8 tensor: got {packed.dtype}.")
    check_last_axis("packed", packed)
    if length < 0 or (length + 1) // 2 != packed.shape[-1]:
        raise RuntimeError(
            f"`length` must be the number of codes in the last axis, two a byte: got {length} "
            f"for {packed.shape[-1]} bytes."
        )
    return integer.unpack_nibbles(packed, length, signed)


def _lift_packed(packed: Tensor, *rest: Any) -> tuple[Any, ...]:
    check_last_axis("packed", packed[0])
    return packed, *rest


PACK_INT4 = define("pack_int4(Tensor code) -> Tensor", _pack, check=_check_nibbles, lift=_lift_packed)
UNPACK_INT4 = define(
    "unpack_int4(Tensor packed, SymInt length, bool signed=True) -> Tensor", _unpack, lift=_lift_packed
)


def pack_int4(code: Tensor) -> Tensor:
    """4-bit codes, two in a byte: ``[…, n]`` integers → ``[…, ⌈n/2⌉]`` uint8.

    ``byte[i] = (q[2i] & 15) | (q[2i + 1] & 15) << 4``, with 0 after an odd end

    ``code`` is int8, uint8, int16, int32 or int64 and holds codes of one format, [−8, 7] or [0, 15]: on CPU others
    raise RuntimeError, elsewhere and in compiled code their low four bits are taken. No gradient.

    Source: ONNX's layout of INT4 and UINT4 tensor data (each row of the last axis on its own).

    >>> pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8))
    tensor([241,   7], dtype=torch.uint8)
    """
    return PACK_INT4(code)


def unpack_int4(packed: Tensor, length: int, signed: bool = True) -> Tensor:
    """The codes that `pack_int4` packed: ``[…, ⌈length/2⌉]`` uint8 → ``[…, length]`` int8, or uint8 if not signed.

    ``length`` tells an odd end from an even one. Raises RuntimeError where it does not fit the bytes. No gradient.

    >>> unpack_int4(torch.tensor([241, 7], dtype=torch.uint8), 3)
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    return UNPACK_INT4(packed, length, signed)
