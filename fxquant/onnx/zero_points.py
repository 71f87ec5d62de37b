"""Zero points that say nothing, left out where onnxruntime would stumble over them."""

from __future__ import annotations

from typing import Any

# What may read a pair's floats for its zero point to be left out, and what may not make them: onnxruntime's integer
# kernels of those want one.
_READERS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "MatMul", "Gemm", "Mul"})
_MAKERS = frozenset({"Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Conv", "ConvTranspose"})


def imply_zero_points(graph: Any) -> int:
    """``Q(x, s, int8 0) → DQ(·, s, int8 0)``  →  ``Q(x, s, output_dtype=INT8) → DQ(·, s)``, where products read it.

    The same codes. onnxruntime 1.31 moves such pairs across Reshape and Transpose, and puts some of its own there; it
    then rewrites int8 to uint8 with zero point 128, forgets the type that it wrote as an attribute, and refuses the
    file ("output_dtype INT8 does not match y_zero_point type UINT8"). A pair without a zero point it leaves alone.
    For targets whose kernels need none. Returns how many pairs it changed.
    """
    import onnx_ir as ir

    done = 0
    for node in list(graph):
        readers = [user for user, _ in node.outputs[0].uses()] if node.op_type == "QuantizeLinear" else []
        has_point = readers and len(node.inputs) > 2
        if (
            has_point
            and all(map(_is_dequantize, readers))
            and _is_int8_zero(node.inputs[2], ir)
            and _may(node, readers)
        ):
            node.resize_inputs(2)
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.INT8))
            for reader in readers:
                reader.resize_inputs(2)
            done += 1
    return done


def _is_dequantize(node: Any) -> bool:
    return bool(node.op_type == "DequantizeLinear")


def _may(node: Any, readers: list[Any]) -> bool:
    maker = node.inputs[0].producer()
    users = [user.op_type for reader in readers for user, _ in reader.outputs[0].uses()]
    return _READERS.issuperset(users) and (maker is None or maker.op_type not in _MAKERS)


def _is_int8_zero(value: Any, ir: Any) -> bool:
    held = value.const_value
    return held is not None and held.dtype == ir.DataType.INT8 and not held.numpy().any()
