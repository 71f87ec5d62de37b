"""Ops that stand for ONNX nodes in a graph on its way to export: integer weights and labelled Q/DQ pairs."""

from __future__ import annotations

from torch import Tensor

from fxquant import numerics
from fxquant.ops.fake_quantize import PER_TENSOR_SCALAR
from fxquant.ops.library import define


def _dequantize(
    code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block_size: int | None = None
) -> Tensor:
    if block_size is not None and axis is not None:
        scale, zero_point = (v.repeat_interleave(block_size, axis) for v in (scale, zero_point))
    elif axis is not None:
        scale, zero_point = (numerics.per_channel_view(v, code.dim(), axis) for v in (scale, zero_point))
    return numerics.dequantize(code, scale, zero_point)


def _quantize_dequantize(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, label: str
) -> Tensor:
    return PER_TENSOR_SCALAR(x, scale, zero_point, quant_min, quant_max, rounding="divide")


DEQUANTIZE = define(
    "dequantize_affine(Tensor code, Tensor scale, Tensor zero_point, int? axis, int? block_size=None) -> Tensor",
    _dequantize,
)
QUANTIZE_DEQUANTIZE = define(
    "quantize_dequantize(Tensor input, float scale, int zero_point, int quant_min, int quant_max, str label) -> Tensor",
    _quantize_dequantize,
)


def dequantize_affine(
    code: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, block_size: int | None = None
) -> Tensor:
    """``(code − zero_point) · scale`` of integer codes: DequantizeLinear.

    Scale and zero point are scalars, one per slice of ``axis``, or with ``block_size`` one per that many consecutive
    codes along ``axis``: they then have the shape of ``code`` but for the number of blocks there.
    """
    return DEQUANTIZE(code, scale, zero_point, axis, block_size)


def quantize_dequantize(
    input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, label: str
) -> Tensor:
    """QuantizeLinear → DequantizeLinear with constant parameters; ``label`` names the site in the artifact."""
    return QUANTIZE_DEQUANTIZE(input, scale, zero_point, quant_min, quant_max, label)


__all__ = ["DEQUANTIZE", "QUANTIZE_DEQUANTIZE", "dequantize_affine", "quantize_dequantize"]
