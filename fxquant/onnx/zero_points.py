"""Zero points that say nothing, left out or written apart where onnxruntime would stumble over them."""

from __future__ import annotations

from typing import Any

# What may read a pair's floats for its zero point to be left out, and what may not make them: onnxruntime's integer
# kernels of those want one.
_READERS = frozenset({"Reshape", "Slice", "Transpose", "Squeeze", "Unsqueeze", "MatMul", "Gemm", "Mul"})
_MOVES = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
_MAKERS = frozenset({"Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Conv", "ConvTranspose"})


def imply_zero_points(graph: Any) -> int:
    """``Q(x, s, int8 0) → DQ(·, s, int8 0)``  →  ``Q(x, s, int8 0) → DQ(·, s)``, where products read it.

    The same codes. onnxruntime 1.31 moves such pairs across Reshape and Transpose, and puts some of its own there; it
    then rewrites int8 to uint8 with zero point 128, forgets the type that it wrote as an attribute, and refuses the
    file ("output_dtype INT8 does not match y_zero_point type UINT8"). A pair whose DequantizeLinear has no zero point
    it leaves alone. The QuantizeLinear keeps its own, which says the type: OpenVINO before 2026.4 does not read
    ``output_dtype`` and takes the codes for uint8, all negative numbers for 0; before 2025.3 it refuses the file.
    For targets whose kernels need none. What is left, because a kernel of the value's maker wants a zero point, is
    quantized again where a Transpose moves it, so that onnxruntime (1.31 and 1.32) has no pair to move there::

        Transpose(DQ(c, s, int8 0))  →  DQ(Q(Transpose(DQ(c, s, int8 0)), s, int8 0), s)

    Returns how many pairs it changed and added.
    """
    import onnx_ir as ir

    done = 0
    for node in list(graph):
        readers = [user for user, _ in node.outputs[0].uses()] if node.op_type == "QuantizeLinear" else []
        has_points = readers and all(_is_dequantize(reader) and len(reader.inputs) > 2 for reader in readers)
        if has_points and _is_int8_zero(node.inputs[2], ir) and _may(node, readers):
            for reader in readers:
                reader.resize_inputs(2)
            done += 1
    return done + sum(_quantize_again(graph, node) for node in list(graph) if node.op_type == "Transpose")


def imply_zeros_of_tables(graph: Any) -> int:
    """``DQ(Gather(codes, i), s, int8 0)``  →  ``DQ(Gather(codes, i), s)``: rows of a table, and what is cut out of one.

    The same codes, whose type is the table's. onnxruntime (1.31 and 1.32) moves a DequantizeLinear with a zero point
    over a Transpose, and then refuses the file, as in `imply_zero_points`: T5's table of relative positions is
    looked up and transposed. Nothing reads these codes as integers. Returns how many it changed.
    """
    import onnx_ir as ir

    found = [node for node in graph if _is_dequantize(node) and len(node.inputs) > 2]
    done = [node for node in found if _is_int8_zero(node.inputs[2], ir) and _is_cut_out(node.inputs[0])]
    for node in done:
        node.resize_inputs(2)
    return len(done)


def _is_cut_out(codes: Any) -> bool:
    """Whether codes are a part of an initializer, chosen as the file runs."""
    whole = codes
    while whole.producer() is not None and whole.producer().op_type in {"Gather", "Slice", *_MOVES}:
        whole = whole.producer().inputs[0]
    return whole is not codes and whole.const_value is not None


def own_zero_points(graph: Any) -> int:
    """``DQ(codes, s, z)`` of two int8 weights with one initializer ``z``  →  a copy of ``z`` for each.

    The same codes. The exporter joins equal initializers. On a CPU whose sums of u8·s8 saturate, onnxruntime (1.31)
    turns int8 weights and their zero points into uint8 when ``session.x64quantprecision`` is 1, each pair on its own,
    and refuses the file at the second that has the same zero point. Returns how many copies it made.
    """
    import onnx_ir as ir

    seen: dict[str, int] = {}
    for node in graph:
        has_zero = _is_dequantize(node) and len(node.inputs) > 2
        codes, zero = (node.inputs[0], node.inputs[2]) if has_zero else (None, None)
        if zero is None or codes is None or codes.const_value is None or not _is_int8_zero(zero, ir):
            continue
        number = seen[zero.name] = seen.get(zero.name, -1) + 1
        if number:
            copy = ir.Value(name=f"{zero.name}__{number}", shape=zero.shape, type=zero.type)
            copy.const_value = ir.tensor(zero.const_value.numpy(), name=copy.name)
            graph.register_initializer(copy)
            node.replace_input_with(2, copy)
    return sum(seen.values())


def _quantize_again(graph: Any, transpose: Any) -> bool:
    """Whether a Transpose moves the floats of an int8 pair with a zero point of 0 that is written."""
    import onnx_ir as ir

    source = transpose.inputs[0].producer()
    while source is not None and source.op_type in _MOVES:
        source = source.inputs[0].producer()
    is_pair = source is not None and source.op_type == "DequantizeLinear" and source.inputs[0].producer() is not None
    if not is_pair or len(source.inputs) < 3 or not _is_int8_zero(source.inputs[2], ir):
        return False
    (moved,), (scale, zero) = transpose.outputs, source.inputs[1:]
    if any(user.op_type == "QuantizeLinear" for user, _ in moved.uses()):
        return False
    quantize = ir.node("QuantizeLinear", [moved, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale])
    for name, node in (("codes", quantize), ("again", dequantize)):
        (value,) = node.outputs
        value.name, value.shape = f"{moved.name}__{name}", moved.shape
    quantize.outputs[0].type, dequantize.outputs[0].type = ir.TensorType(ir.DataType.INT8), moved.type
    ir.convenience.replace_all_uses_with(moved, dequantize.outputs[0], replace_graph_outputs=True)
    quantize.replace_input_with(0, moved)
    graph.insert_after(transpose, [quantize, dequantize])
    return True


def _is_dequantize(node: Any) -> bool:
    return bool(node.op_type == "DequantizeLinear")


def _may(node: Any, readers: list[Any]) -> bool:
    maker = node.inputs[0].producer()
    users = [user.op_type for reader in readers for user, _ in reader.outputs[0].uses()]
    return _READERS.issuperset(users) and (maker is None or maker.op_type not in _MAKERS)


def _is_int8_zero(value: Any, ir: Any) -> bool:
    held = value.const_value
    return held is not None and held.dtype == ir.DataType.INT8 and not held.numpy().any()
