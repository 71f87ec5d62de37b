"""Ops that stand for ONNX nodes in a graph on its way to export: integer weights and labelled Q/DQ pairs."""

from __future__ import annotations

from torch import Tensor

from fxquant import numerics
from fxquant.numerics import elements
from fxquant.numerics.formats import float_format
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_TENSOR_SCALAR, scale_tensor
from fxquant.ops.library import define
from fxquant.ops.qparams import AFFINE_QPARAMS, BLOCK_QPARAMS, CHANNEL_MIN_MAX, SYMMETRIC_QPARAMS


def _dequantize(
    code: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    block_size: int | None = None,
    *,
    element: str | None = None,
) -> Tensor:
    if block_size is not None and axis is not None:
        scale, zero_point = (v.repeat_interleave(block_size, axis) for v in (scale, zero_point))
    elif axis is not None:
        scale, zero_point = (numerics.per_channel_view(v, code.dim(), axis) for v in (scale, zero_point))
    if element is not None:
        return elements.decode(code, float_format(element)) * scale
    return numerics.dequantize(code, scale, zero_point)


def _quantize_dequantize(
    x: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    label: str,
    *,
    element: str | None = None,
) -> Tensor:
    if element is not None:
        return elements.fake_quantize(x, scale_tensor(scale, x.device), float_format(element), "divide")
    return PER_TENSOR_SCALAR(x, scale, zero_point, quant_min, quant_max, rounding="divide")


def _quantize_dequantize_blocks(
    x: Tensor,
    size: int,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    element: str | None,
    scale_format: str | None,
    tensor_amax: float | None,
    label: str,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1] if size < 0 else size)
    if quant_min >= 0 or not symmetric:
        scale, point = AFFINE_QPARAMS(*CHANNEL_MIN_MAX(rows, 0), quant_min, quant_max, symmetric)
    elif scale_format is None:
        scale, point = SYMMETRIC_QPARAMS(rows, 0, quant_max, element=element)
    else:
        amax = None if tensor_amax is None else scale_tensor(tensor_amax, x.device)
        scale, point = BLOCK_QPARAMS(rows, amax, quant_max, scale_format, element=element)
    y = PER_CHANNEL(rows, scale, point, 0, quant_min, quant_max, rounding="divide", element=element)
    return y.reshape(x.shape)


DEQUANTIZE = define(
    "dequantize_affine(Tensor code, Tensor scale, Tensor zero_point, int? axis, int? block_size=None, *, "
    "str? element=None) -> Tensor",
    _dequantize,
)
QUANTIZE_DEQUANTIZE = define(
    "quantize_dequantize(Tensor input, float scale, int zero_point, int quant_min, int quant_max, str label, *, "
    "str? element=None) -> Tensor",
    _quantize_dequantize,
)
QUANTIZE_DEQUANTIZE_BLOCKS = define(
    "quantize_dequantize_blocks(Tensor input, int size, int quant_min, int quant_max, bool symmetric, "
    "str? element, str? scale_format, float? tensor_amax, str label) -> Tensor",
    _quantize_dequantize_blocks,
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


def quantize_dequantize_blocks(
    input: Tensor,
    size: int,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    element: str | None,
    scale_format: str | None,
    tensor_amax: float | None,
    label: str,
) -> Tensor:
    """A tensor quantized along its last axis by scales that its own values give: one for each block or row of it.

    Args:
        size: of a block, which must divide the axis; −1 for the whole axis, a scale per token.
        quant_min, quant_max: the lowest and the highest code, of integers.
        symmetric: whether the zero point is fixed; otherwise a block has its own, as in `fxquant.ops.affine_qparams`.
        element: a small float in the place of integers.
        scale_format: as in `fxquant.ops.block_qparams`; None for ``amax / max`` in float32.
        tensor_amax: what "e4m3" scales are relative to; the tensor's own where None.
        label: names the site in the artifact.
    """
    return QUANTIZE_DEQUANTIZE_BLOCKS(
        input, size, quant_min, quant_max, symmetric, element, scale_format, tensor_amax, label
    )


__all__ = [
    "DEQUANTIZE",
    "QUANTIZE_DEQUANTIZE",
    "QUANTIZE_DEQUANTIZE_BLOCKS",
    "dequantize_affine",
    "quantize_dequantize",
    "quantize_dequantize_blocks",
]
