"""Files that onnxruntime has no kernels for, run as the standard says by onnx's own evaluator.

Codes of 4-bit floats are in the standard from opset 23 on, and TensorRT's quantizers of blocks in no standard: those
are written here, as their documents have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxquant.support.require import require
from fxquant.targets.document import Feeds, all_nodes, as_declared

if TYPE_CHECKING:
    import numpy as np
    import onnx

TRT = "trt"  # the domain of TensorRT's own operators
_UNKNOWN = ("FLOAT4E2M1", "FLOAT8E8M0")  # types of which onnxruntime on a CPU has no kernels


def needs_standard(model: onnx.ModelProto) -> bool:
    """Whether a file has codes or operators that onnxruntime on a CPU does not run."""
    kinds = require("onnx").TensorProto.DataType
    unknown = {kinds.Value(name) for name in _UNKNOWN}
    if any(tensor.data_type in unknown for tensor in model.graph.initializer):
        return True
    return any(
        node.domain == TRT or any(a.name == "output_dtype" and a.i in unknown for a in node.attribute)
        for node in all_nodes(model.graph)
    )


def run_standard(model: onnx.ModelProto, names: Sequence[str] | None, feeds: Feeds) -> list[np.ndarray]:
    """Values by name, the outputs for None. Raises what the evaluator raises."""
    evaluator = require("onnx.reference").ReferenceEvaluator(model, new_ops=_operators())
    found = evaluator.run(None if names is None else list(names), dict(as_declared(model, feeds)))
    return list(found)


def bits(codes: np.ndarray) -> np.ndarray:
    """Codes of small floats as bytes, of others as they are."""
    np = require("numpy")
    small = codes.dtype.itemsize == 1 and codes.dtype.kind not in "iub"
    return codes.view(np.uint8) if small and "int" not in codes.dtype.name else codes


def _operators() -> list[Any]:
    """TensorRT's quantizers of blocks along the last axis."""
    np, ml_dtypes = require("numpy"), require("ml_dtypes")
    base = require("onnx.reference.op_run").OpRun

    def rows(x: Any, size: int) -> Any:
        return x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)

    def cast(x: Any, kind: Any) -> Any:
        largest = float(ml_dtypes.finfo(kind).max)
        return np.clip(x, -largest, largest).astype(kind)

    class TRT_FP4DynamicQuantize(base):  # type: ignore[misc, valid-type]
        """x, unit  →  fp4 codes, fp8 codes of the blocks' scales below the unit."""

        op_domain = TRT

        def _run(self, x: Any, unit: Any, axis: int = -1, block_size: int = 16, scale_type: int = 17) -> Any:
            blocks = rows(x, block_size)
            amax = np.abs(blocks).max(-1, keepdims=True)
            scales = cast(amax / np.float32(6.0) / unit, ml_dtypes.float8_e4m3fn)
            step = scales.astype(np.float32) * unit
            codes = cast(blocks / np.where(step == 0, np.float32(1.0), step), ml_dtypes.float4_e2m1fn)
            return codes.reshape(x.shape), scales[..., 0]

    class TRT_MXFP8DynamicQuantize(base):  # type: ignore[misc, valid-type]
        """x  →  fp8 codes, exponents of the blocks' scales."""

        op_domain = TRT

        def _run(self, x: Any, axis: int = -1, block_size: int = 32, output_dtype: int = 17) -> Any:
            blocks = rows(x, block_size)
            _, exponent = np.frexp(np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(2.0**-126)))
            exponent = np.maximum(exponent - 1 - 8, -127)
            codes = cast(np.ldexp(blocks, -exponent).astype(np.float32), ml_dtypes.float8_e4m3fn)
            return codes.reshape(x.shape), (exponent[..., 0] + 127).astype(np.uint8)

    class TRT_MXFP8DequantizeLinear(base):  # type: ignore[misc, valid-type]
        """fp8 codes, exponents of scales  →  floats."""

        op_domain = TRT

        def _run(self, codes: Any, exponents: Any, axis: int = -1, block_size: int = 32, output_dtype: int = 1) -> Any:
            scale = np.ldexp(np.float32(1.0), exponents.astype(np.int32) - 127).astype(np.float32)
            kind = require("onnx.helper").tensor_dtype_to_np_dtype(output_dtype)
            return ((rows(codes, block_size) * scale[..., None]).reshape(codes.shape).astype(kind),)

    return [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]
