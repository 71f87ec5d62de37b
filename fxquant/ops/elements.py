"""``fxquant::{quantize,dequantize}_elements``: codes of small floats, each a byte with the format's own bits.

What backward keeps of a tensor whose fake-quant has an ``element``: internal to compiled graphs
(`fxquant.passes.joint.save_quantized_activations`). Codes of 8 bits are those of torch.float8_e4m3fn and
torch.float8_e5m2, which `quantize_float` gives; narrower ones stand in the low bits. The arithmetic is
`fxquant.numerics.elements`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import elements, per_channel_view
from fxquant.numerics.affine import rounded
from fxquant.numerics.division import Rounding
from fxquant.numerics.formats import float_format
from fxquant.ops.checks import check_floating, check_rounding
from fxquant.ops.library import define


def _step(scale: Tensor, dims: int, axis: int | None) -> Tensor:
    if axis is None and scale.numel() != 1:
        raise InvalidArgument(f"`scale` must have one element without an axis: got shape {tuple(scale.shape)}.")
    return scale.reshape(()) if axis is None else per_channel_view(scale, dims, axis)


def _quantize(x: Tensor, scale: Tensor, axis: int | None, element: str, *, rounding: Rounding = "divide") -> Tensor:
    check_floating("input", x)
    check_rounding(rounding)
    found = float_format(element)
    return elements.encode(elements.quantize(x, _step(scale, x.dim(), axis), found, rounding), found)


def _dequantize(
    code: Tensor, scale: Tensor, axis: int | None, element: str, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    if code.dtype != torch.uint8:
        raise InvalidArgument(f"`code` must be uint8: got {code.dtype}. `quantize_elements` gives that.")
    value = elements.decode(code, float_format(element))
    return rounded(value * _step(scale, code.dim(), axis).to(torch.float32), dtype)


QUANTIZE_ELEMENTS = define(
    'quantize_elements(Tensor input, Tensor scale, int? axis, str element, *, str rounding="divide") -> Tensor',
    _quantize,
)
DEQUANTIZE_ELEMENTS = define(
    "dequantize_elements(Tensor code, Tensor scale, int? axis, str element, *, ScalarType dtype=float) -> Tensor",
    _dequantize,
)


def quantize_elements(
    input: Tensor, scale: Tensor, element: str, *, axis: int | None = None, rounding: str = "divide"
) -> Tensor:
    """The codes of ``round(x / scale)`` in a small float format, as uint8 of x's shape.

    Args:
        input: float32, float64, float16 or bfloat16.
        scale: one element or, with ``axis``, one for each slice. 0 divides as 1 does.
        element: ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"`` or ``"e2m1"``; what lies beyond its ends becomes them.
        rounding: ``"divide"``, or ``"reciprocal"`` for ``x · (1 / scale)``.

    NaN has the code of NaN where the format has one, else that of 0. No gradient.

    >>> quantize_elements(torch.tensor([0.3, 5.1, -1000.0]), torch.ones(1), "e2m1")
    tensor([ 1,  7, 15], dtype=torch.uint8)
    """
    return QUANTIZE_ELEMENTS(input, scale, axis, element, rounding=rounding)


def dequantize_elements(
    code: Tensor, scale: Tensor, element: str, *, axis: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``value · scale`` of `quantize_elements`'s codes, in float32, rounded once to ``dtype``. No gradient.

    The same bits as the fake-quant with this ``element`` gives, but for NaN in formats without one.
    """
    return DEQUANTIZE_ELEMENTS(code, scale, axis, element, dtype=dtype)


__all__ = ["dequantize_elements", "quantize_elements"]
