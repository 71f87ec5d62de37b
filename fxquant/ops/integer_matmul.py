"""``fxquant::integer_convolution``, and where this machine multiplies codes exactly.

Products of matrices need no operator of ours: `torch.ops.aten._int_mm` is one, and what follows it is arithmetic
(`fxquant.numerics.integer.matmul`). Convolutions of integers are in torch for CPUs only, by oneDNN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily  # private; tried on 2.13 and 2.15

from fxquant.errors import InvalidArgument
from fxquant.ops.library import LIBRARY

# Codes are at most 255 and 128 large: sums of more products than this may not fit int32.
LONGEST_SUM = (2**31 - 1) // (255 * 128)

LIBRARY.define(
    "integer_convolution(Tensor code, Tensor weight, Tensor zero_point, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
INTEGER_CONVOLUTION = torch.ops.fxquant.integer_convolution.default


def _check(code: Tensor, weight: Tensor, zero_point: Tensor) -> None:
    for name, tensor, dtype in (("code", code, torch.uint8), ("weight", weight, torch.int8)):
        if tensor.dtype is not dtype:
            raise InvalidArgument(f"{name} must be {dtype}: got {tensor.dtype}. Shift the codes by 128.")
    if zero_point.numel() != 1:
        raise InvalidArgument(f"zero_point must be one element: got shape {tuple(zero_point.shape)}.")


def _kernel(
    code: Tensor,
    weight: Tensor,
    zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(code, weight, zero_point)
    channels, point = weight.shape[0], int(zero_point)
    # With scales of 1 the kernel gives its sums, as float32; tried on torch 2.13, exact for 1 to 3 dimensions.
    ones = torch.ones(channels)
    where = (stride, padding, dilation, groups)
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, point, *where, list(code.shape))
    points = torch.zeros(channels, dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        *(code, 1.0, point, packed, ones, points, None), *where, *(1.0, 0, torch.float32, "none", [], "")
    )


def _fake(
    code: Tensor,
    weight: Tensor,
    zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(code, weight, zero_point)
    # One dimension stands as a row of two in the kernel; the channels come last in all.
    like = (code.to(torch.float32), weight.to(torch.float32))
    out = torch.ops.aten.convolution(*like, None, stride, padding, dilation, False, [0] * len(stride), groups)
    return out.movedim(1, -1).contiguous().movedim(-1, 1)


LIBRARY.impl("integer_convolution", _kernel, "CPU")
torch.library.register_fake("fxquant::integer_convolution", _fake, lib=LIBRARY)


def integer_convolution(
    code: Tensor,
    weight: Tensor,
    zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The sums of an integer convolution: ``Σ (code − zero_point) · weight``, exact in int32, as float32.

    Args:
        code: uint8, [N, C, …] with 1 to 3 dimensions after the channels; padded with ``zero_point``.
        weight: int8, [O, C / groups, …].
        zero_point: one integer, of ``code``.
        stride, padding, dilation: one number per dimension after the channels.
        groups: as in `torch.nn.functional.conv2d`.

    The result has its channels last in memory. CPU only, no gradient; ONNX's ConvInteger. Raises InvalidArgument for
    other dtypes and for a zero point per channel.
    """
    return INTEGER_CONVOLUTION(code, weight, zero_point, stride, padding, dilation, groups)


@functools.cache
def multiplies_exactly(kind: str, device: str, signed: bool) -> str:
    """Why ``"matmul"`` or ``"conv"`` of integers cannot be used on a device; empty where its sums are exact.

    CPUs without VNNI add pairs of products in 16 bits, which saturate: tried with the largest codes.
    """
    if kind == "conv":
        if torch.device(device).type != "cpu":
            return "torch convolves integers on CPU only"
        if not hasattr(torch.ops.onednn, "qconv_pointwise"):
            return "this build of torch has no oneDNN"
    with unset_fake_temporarily():
        try:
            found, expected = _largest(kind, device, signed)
        except (RuntimeError, NotImplementedError) as error:
            return f"torch refuses: {str(error).splitlines()[0]}"
        return "" if torch.equal(found, expected) else "the integer kernel of this machine saturates"


@functools.cache
def widest_exact_code() -> int:
    """The largest activation code that `integer_convolution` multiplies exactly here: 255, 127, or 0 for none.

    127 where pairs of products are added in 16 bits, which hold twice 127 · 128: CPUs with AVX2 and no VNNI.
    """
    if not hasattr(torch.ops.onednn, "qconv_pointwise"):
        return 0
    with unset_fake_temporarily():
        return next((large for large in (255, 127) if all(map(torch.equal, *_sums(large)))), 0)


def _sums(large: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of products of a code with the least weight and the largest, and what they must be."""
    zero = torch.zeros(1, dtype=torch.int32)
    code = torch.full((1, 16, 5, 5), large, dtype=torch.uint8)
    weights = [torch.full((16, 16, size, size), end, dtype=torch.int8) for end in (-128, 127) for size in (1, 3)]
    found = [integer_convolution(code, each, zero, [1, 1], [0, 0], [1, 1]).contiguous() for each in weights]
    return found, [
        torch.full_like(y, float(large * each[0].int().sum())) for y, each in zip(found, weights, strict=True)
    ]


def _largest(kind: str, device: str, signed: bool) -> tuple[Tensor, Tensor]:
    """Sums of products of the largest codes, and what they must be."""
    large, dtype = (127, torch.int8) if signed else (255, torch.uint8)
    if kind == "matmul":
        lhs = torch.full((32, 64), large, dtype=dtype, device=device)
        rhs = torch.full((32, 64), 127, dtype=torch.int8, device=device)
        return torch._int_mm(lhs, rhs.t()), torch.full((32, 32), 64 * large * 127, dtype=torch.int32, device=device)
    code = torch.full((1, 16, 5, 5), large, dtype=dtype)
    weight = torch.full((16, 16, 3, 3), 127, dtype=torch.int8)
    zero = torch.zeros(1, dtype=torch.int32)
    found = integer_convolution(code, weight, zero, [1, 1], [0, 0], [1, 1])
    return found.contiguous(), torch.full((1, 16, 3, 3), 16 * 9.0 * large * 127)


__all__ = ["INTEGER_CONVOLUTION", "LONGEST_SUM", "integer_convolution", "multiplies_exactly", "widest_exact_code"]
