"""fxquant's operators as native QuantizeLinear and DequantizeLinear, for torch.onnx's dynamo exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxquant.numerics.storage import storage
from fxquant.onnx.element_types import onnx_type
from fxquant.onnx.functions import Value, constant, without_annotations
from fxquant.onnx.translate_amax import amax_translations
from fxquant.onnx.translate_operators import operator_translations
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE, QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.support.require import require


def translation_table(opset: int = 21) -> dict[Any, Callable[..., Any]]:
    """Op → ONNX function, for ``torch.onnx.export(dynamo=True, custom_translation_table=…)``.

    ``opset`` is that of the export. `export_onnx` uses it; so can a model that calls ``fxquant.ops`` or
    ``fxquant.tensor_quant`` itself and was never prepared.
    """
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package)
    import numpy as np
    from onnxscript import opset21 as op

    def quantize_dequantize(
        input: Value,
        scale: float,
        zero_point: int,
        quant_min: int,
        quant_max: int,
        label: str,
        element: str | None = None,
    ) -> Value:
        if element is not None:
            qparams = constant(op, np.float32(scale)), constant(op, np.zeros((), dtype=onnx_type(element)))
            codes = op.QuantizeLinear(input, *qparams)
            codes.name = label
            return op.DequantizeLinear(codes, *qparams)
        name, low, high = storage(quant_min, quant_max)
        step = np.float32(scale)
        if (quant_min, quant_max) != (low, high):
            # The type is wider than the range: only a clip keeps the codes inside it.
            edges = (np.float32((limit - zero_point) * step) for limit in (quant_min, quant_max))
            input = op.Clip(input, *(constant(op, edge) for edge in edges))
        qparams = constant(op, step), constant(op, np.dtype(name).type(zero_point))
        codes = op.QuantizeLinear(input, *qparams)
        codes.name = label
        return op.DequantizeLinear(codes, *qparams)

    def quantize_dequantize_blocks(input: Value, *format: Any) -> Value:
        # A pair that stands for the form of the target: `fxquant.onnx.block_forms` finds it by its label.
        one, zero = constant(op, np.float32(len(blocks) + 1)), constant(op, np.int8(0))
        blocks.append(format)
        codes = op.QuantizeLinear(input, one, zero)
        codes.name = format[-1]
        return op.DequantizeLinear(codes, one, zero)

    def dequantize(
        code: Value,
        scale: Value,
        zero_point: Value,
        axis: int | None = None,
        block_size: int | None = None,
        element: str | None = None,
    ) -> Value:
        given = {"axis": axis, "block_size": block_size}
        if element is not None:  # the codes become that type when they are written: `fxquant.onnx.element_types`
            return op.DequantizeLinear(code, scale, **{k: v for k, v in given.items() if v is not None})
        return op.DequantizeLinear(code, scale, zero_point, **{k: v for k, v in given.items() if v is not None})

    def flatten(self: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        # onnxruntime moves a DQ through Reshape but not through Flatten.
        rank = len(self.shape)
        if end_dim % rank != rank - 1:
            from onnxscript.function_libs.torch_lib.ops.core import aten_flatten

            return aten_flatten(self, start_dim, end_dim)
        shape = np.array([0] * (start_dim % rank) + [-1], dtype=np.int64)
        return op.Reshape(self, constant(op, shape))

    blocks: list[tuple[Any, ...]] = []
    ours: dict[Any, Callable[..., Value]] = {
        QUANTIZE_DEQUANTIZE: quantize_dequantize,
        QUANTIZE_DEQUANTIZE_BLOCKS: quantize_dequantize_blocks,
        DEQUANTIZE: dequantize,
    }
    ours[torch.ops.aten.flatten.using_ints] = flatten
    return {**operator_translations(), **amax_translations(opset), **without_annotations(ours)}
