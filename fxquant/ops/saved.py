"""What backward keeps of a quantizer's input: its clip mask, and bits packed into bytes.

Internal to compiled graphs (`fxquant.passes.joint.save_quantized_activations`); codes themselves come from
`fxquant.ops.quantize`.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.numerics import affine, elements, planes
from fxquant.numerics.division import Rounding
from fxquant.numerics.formats import float_format
from fxquant.ops.affine_checks import per_tensor_arguments
from fxquant.ops.library import define, same_arguments


def _mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
    element: str | None = None,
) -> Tensor:
    per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, rounding)
    if element is not None:
        return elements.clip_mask(x, scale.reshape(()), float_format(element), rounding)
    return affine.clip_mask_per_tensor(x, scale.reshape(()), zero_point.reshape(()), quant_min, quant_max, rounding)


def _check_planes(bits: int, length: int | None = None) -> None:
    if bits not in (1, 2, 4):
        raise RuntimeError(f"`bits` must be 1, 2 or 4: got {bits}.")
    if length is not None and length % (8 // bits):
        raise RuntimeError(f"`dim` must have a multiple of {8 // bits} elements for {bits} bits: got {length}.")


def _pack(values: Tensor, bits: int, dim: int) -> Tensor:
    _check_planes(bits, values.shape[dim])
    return planes.pack_planes(values, bits, dim)


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    _check_planes(bits)
    return planes.unpack_planes(packed, bits, dim)


CLIP_MASK = define(
    "clip_mask_per_tensor_affine(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    '*, str rounding="reciprocal", str? element=None) -> Tensor',
    _mask,
    lift=same_arguments,
)
PACK_PLANES = define("pack_planes(Tensor values, int bits, int dim) -> Tensor", _pack)
UNPACK_PLANES = define("unpack_planes(Tensor packed, int bits, int dim) -> Tensor", _unpack)

FORWARD = (CLIP_MASK, PACK_PLANES)
BACKWARD = (UNPACK_PLANES,)


def pack_planes(values: Tensor, bits: int, dim: int) -> Tensor:
    """``[…, n, …]`` integers below 2^bits, or bools, as ``[…, n·bits/8, …]`` uint8, for 1, 2 or 4 bits.

    The low ``bits`` of byte j along ``dim`` hold element j, the next ones element ``j + n·bits/8``, and so on.
    RuntimeError where n does not fill whole bytes.

    >>> pack_planes(torch.tensor([True, False, False, False, False, False, False, True]), 1, 0)
    tensor([129], dtype=torch.uint8)
    """
    return PACK_PLANES(values, bits, dim)


def unpack_planes(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of `pack_planes`, as int32."""
    return UNPACK_PLANES(packed, bits, dim)


__all__ = ["pack_planes", "unpack_planes"]
