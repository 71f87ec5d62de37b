"""Codes that are small floats, in the types that ONNX has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.errors import ExportError
from fxquant.support.require import require

# element → numpy's type of it, ONNX's name, and the opset that has it in QuantizeLinear and DequantizeLinear
_TYPES = {
    "e4m3": ("float8_e4m3fn", "FLOAT8E4M3FN", 21),
    "e5m2": ("float8_e5m2", "FLOAT8E5M2", 21),
    "e2m1": ("float4_e2m1fn", "FLOAT4E2M1", 23),
}


def onnx_type(element: str) -> Any:
    """numpy's type of an element. Raises ExportError for one that ONNX has no type for."""
    if element not in _TYPES:
        known = ", ".join(map(repr, _TYPES))
        raise ExportError(
            f"element must be one that ONNX has a type for, {known}, to be exported: got {element!r}. "
            "Train with it, and deploy another."
        )
    return getattr(require("ml_dtypes"), _TYPES[element][0])


def least_opset(element: str) -> int:
    """The first opset whose Q/DQ have the element's type."""
    onnx_type(element)
    return _TYPES[element][2]


def type_codes(model: Any, elements: Mapping[str, str]) -> None:
    """Gives initializers of codes, a byte each, the type of their element: the same bits.

    ``elements``: initializer → element. What is not in the model, as no product reads it, is left out.
    """
    np, ir = require("numpy"), require("onnx_ir")
    initializers = model.graph.initializers
    for name, element in elements.items():
        value = initializers.get(name)
        if value is None:
            continue
        kind = ir.DataType[_TYPES[element][1]]
        codes = np.ascontiguousarray(value.const_value.numpy()).view(onnx_type(element))
        tensor = ir.tensor(codes, dtype=kind, name=name)
        fresh = ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(kind), const_value=tensor)
        value.replace_all_uses_with(fresh)
        del initializers[name]
        initializers[name] = fresh
