"""The amax quantizers as native QuantizeLinear and DequantizeLinear, for torch.onnx's dynamo exporter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxquant.errors import InvalidArgument
from fxquant.onnx.functions import Value, constant, without_annotations
from fxquant.ops import amax as ops
from fxquant.support.require import require
from fxquant.tensor_quant import symbolic
from fxquant.tensor_quant.symbolic import Operand


class OnnxScript:
    """`fxquant.tensor_quant.symbolic.Emitter` over onnxscript's eager-looking opset, while it traces."""

    def __init__(self, opset: int) -> None:
        import onnxscript

        nodes = getattr(onnxscript, f"opset{opset}", None)
        if nodes is None:
            raise InvalidArgument(f"opset must be one that onnxscript has: got {opset}. Use 21, or 23 for float4e2m1.")
        self.nodes: Any = nodes
        self.opset = opset

    def op(self, name: str, *inputs: Any, **attributes: int) -> Any:
        """A node."""
        return getattr(self.nodes, name)(*inputs, **attributes)

    def number(self, value: float) -> Any:
        """A float32 scalar."""
        import numpy as np

        return constant(self.nodes, np.float32(value))

    def vector(self, values: Sequence[int]) -> Any:
        """An int64 vector."""
        import numpy as np

        return constant(self.nodes, np.array(list(values), dtype=np.int64))

    def zeros(self, kind: str, shape: tuple[int, ...]) -> Any:
        """Zeros of any of the types that ml_dtypes and numpy name."""
        import ml_dtypes
        import numpy as np

        names = {"float8e4m3fn": "float8_e4m3fn", "float8e5m2": "float8_e5m2", "float4e2m1": "float4_e2m1fn"}
        name = names.get(kind, kind)
        return constant(self.nodes, np.zeros(shape, dtype=getattr(np, name, None) or getattr(ml_dtypes, name)))


def _operand(value: Any) -> Operand:
    """A value of the exporter; open sizes are None."""
    dtypes = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "DOUBLE": torch.float64}
    return Operand(value, dtypes[value.dtype.name], [s if isinstance(s, int) else None for s in value.shape])


def amax_translations(opset: int = 21) -> dict[Any, Callable[..., Any]]:
    """Op → ONNX function, for ``torch.onnx.export(dynamo=True, custom_translation_table=…)``.

    ``scale = amax / B`` is emitted as nodes, so amax may be a buffer, a parameter or computed; the exporter folds it
    where it is constant. Zero points are typed (u)int8, float8e4m3fn and float8e5m2 (opset 19), (u)int4 and (u)int16
    (opset 21), float4e2m1 (opset 23). Formats narrower than their type get a clip in front. An affine range that
    does not hold 0 has no zero point in ONNX: its result is NaN.

    Args:
        opset: the ``opset_version`` of the export.

    Raises MissingDependency without onnxscript; ExportError, while exporting, for a format or an amax that ONNX has
    no form for.
    """
    require("onnxscript")
    emit = OnnxScript(opset)

    def integer(
        input: Value, amax: Value, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Value:
        return symbolic.integer(emit, _operand(input), _operand(amax), num_bits, unsigned, narrow_range)

    def floating(input: Value, amax: Value | None = None, E: int = 4, M: int = 3) -> Value:
        reach = None if amax is None else _operand(amax)
        return symbolic.floating(emit, _operand(input), reach, E, M)

    def affine(input: Value, min: Value, max: Value, num_bits: int = 8) -> Value:
        return symbolic.affine(emit, _operand(input), _operand(min), _operand(max), num_bits)

    integers = (
        ops.FAKE_TENSOR_QUANT,
        ops.FAKE_TENSOR_QUANT_PASS_THROUGH,
        ops.FAKE_TENSOR_QUANT_LEARNABLE,
        ops.LEGACY_FAKE_TENSOR_QUANT,
    )
    floats = (ops.SCALED_FLOAT, ops.SCALED_FLOAT_PASS_THROUGH, ops.SCALED_FLOAT_LEARNABLE)
    ours: dict[Any, Callable[..., Value]] = {
        **dict.fromkeys(integers, integer),
        **dict.fromkeys(floats, floating),
        ops.FAKE_AFFINE_TENSOR_QUANT: affine,
    }
    return without_annotations(ours)
