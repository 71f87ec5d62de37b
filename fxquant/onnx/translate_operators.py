"""``fxquant.ops.fake_quantize_*``, integer and float8, called by a model itself, as native Q/DQ pairs.

Scale and zero point may be constants or computed. ONNX divides by the scale: with ``rounding="divide"`` codes are
equal, with ``"reciprocal"`` a tie may fall to the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.errors import ExportError
from fxquant.numerics.storage import storage
from fxquant.onnx.functions import Value, constant, without_annotations
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_TENSOR, PER_TENSOR_SCALAR
from fxquant.ops.floating import FAKE_QUANTIZE_FLOAT
from fxquant.support.require import require

_FLOAT_TYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def operator_translations() -> dict[Any, Callable[..., Any]]:
    """Op → ONNX function, for ``torch.onnx.export(custom_translation_table=…)``."""
    require("onnxscript")
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset21

    op: Any = opset21  # typed for graph builders that know every dtype

    def numbers(
        input: Value, scale: float, zero_point: int, quant_min: int, quant_max: int, rounding: str = "reciprocal"
    ) -> Value:
        qparams = constant(op, np.float32(scale)), constant(op, np.int32(zero_point))
        return _pair(op, input, *qparams, quant_min, quant_max)

    def tensors(
        input: Value, scale: Value, zero_point: Value, quant_min: int, quant_max: int, rounding: str = "reciprocal"
    ) -> Value:
        scalar = constant(op, np.array([], dtype=np.int64))
        scale = op.Reshape(op.Cast(scale, to=ir.DataType.FLOAT), scalar)
        return _pair(op, input, scale, op.Reshape(zero_point, scalar), quant_min, quant_max)

    def channels(
        input: Value,
        scale: Value,
        zero_point: Value,
        axis: int,
        quant_min: int,
        quant_max: int,
        rounding: str = "reciprocal",
    ) -> Value:
        return _pair(op, input, op.Cast(scale, to=ir.DataType.FLOAT), zero_point, quant_min, quant_max, axis)

    def floats(
        input: Value, scale: Value | None, format: str, seed: Value | None = None, saturate: bool = True
    ) -> Value:
        return _float_pair(op, input, scale, format, seed, saturate)

    return without_annotations(
        {PER_TENSOR_SCALAR: numbers, PER_TENSOR: tensors, PER_CHANNEL: channels, FAKE_QUANTIZE_FLOAT: floats}
    )


def _pair(
    op: Any, input: Value, scale: Value, zero_point: Value, quant_min: int, quant_max: int, axis: int | None = None
) -> Value:
    """Clip where the type holds more codes than the range, QuantizeLinear, DequantizeLinear."""
    import numpy as np
    import onnx_ir as ir

    name, low, high = storage(quant_min, quant_max)
    kind = {} if axis is None else {"axis": axis}
    wide = input if input.dtype == ir.DataType.FLOAT else op.Cast(input, to=ir.DataType.FLOAT)
    if (quant_min, quant_max) != (low, high):
        point = op.Cast(zero_point, to=ir.DataType.FLOAT)
        view = constant(op, np.array([-1] + [1] * (len(input.shape) - 1 - (axis or 0)), dtype=np.int64))
        edges = [op.Mul(op.Sub(constant(op, np.float32(limit)), point), scale) for limit in (quant_min, quant_max)]
        if axis is not None:
            edges = [op.Reshape(edge, view) for edge in edges]
        wide = op.Min(op.Max(wide, edges[0]), edges[1])
    point = op.Cast(zero_point, to=ir.DataType[name.upper()])
    out = op.DequantizeLinear(op.QuantizeLinear(wide, scale, point, **kind), scale, point, **kind)
    return out if input.dtype == ir.DataType.FLOAT else op.CastLike(out, input)


def _float_pair(
    op: Any, input: Value, scale: Value | None, format: str, seed: Value | None = None, saturate: bool = True
) -> Value:
    """The pair of an 8-bit float, with scales along one axis at most."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    kind = _FLOAT_TYPES.get(format)
    if not kind or seed is not None:
        asked = f"format {format!r}" if not kind else "a seed"
        known = ", ".join(map(repr, _FLOAT_TYPES))
        raise ExportError(f"fake_quantize_float must have a format among {known} and no seed in ONNX: got {asked}.")
    wide = input if input.dtype == ir.DataType.FLOAT else op.Cast(input, to=ir.DataType.FLOAT)
    sizes = [] if scale is None else list(scale.shape)
    axes = [len(input.shape) - len(sizes) + i for i, size in enumerate(sizes) if size != 1]
    if len(axes) > 1:
        raise ExportError(f"fake_quantize_float must have its scales along one axis in ONNX: got {len(axes)} axes.")
    shape = [int(sizes[axes[0] - len(input.shape)])] if axes else []
    step = constant(op, np.float32(1.0)) if scale is None else op.Cast(scale, to=ir.DataType.FLOAT)
    step = step if len(sizes) == len(shape) else op.Reshape(step, constant(op, np.array(shape, dtype=np.int64)))
    along = {"axis": axes[0]} if axes else {}
    zero = constant(op, np.zeros(shape, dtype=getattr(ml_dtypes, kind)))
    codes = op.QuantizeLinear(wide, step, zero, saturate=int(saturate), **along)
    out = op.DequantizeLinear(codes, step, zero, **along)
    return out if input.dtype == ir.DataType.FLOAT else op.CastLike(out, input)
