"""Zero points that say nothing, left out or written apart where onnxruntime would stumble over them."""

from __future__ import annotations

from typing import Any

# What may read a pair's floats for its zero point to be left out, and what may not make them: onnxruntime's integer
# kernels of those want one.
_READERS = frozenset({"Reshape", "Slice", "Transpose", "Squeeze", "Unsqueeze", "MatMul", "Gemm", "Mul"})
_MOVES = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
_TABLE_MOVES = frozenset({"Transpose", "Slice", "Expand", "Flatten", *_MOVES})
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


def move_codes_of_tables(graph: Any) -> int:
    """``move(DQ(Gather(codes, i), s, z))``  →  ``DQ(move(Gather(codes, i)), s, z)``, for each move that follows.

    The same numbers: rows of a table, or what is cut out of one, are turned, cut and reshaped as codes. Onnxruntime's
    optimizer would put a pair of its own after a DequantizeLinear in front of a Reshape, Transpose, Slice or Unsqueeze,
    and from 1.27 on refuse what it wrote (`imply_zero_points`); without the zero point it is 1.26 and older that take
    those codes for uint8. T5's relative positions are such a table. Of codes with one scale; returns how many moves.
    """
    import onnx_ir as ir

    done = 0
    waiting = [node for node in graph if _is_of_a_table(node, ir)]
    while waiting:
        node = waiting.pop()
        (value,) = node.outputs
        moves = [user for user, place in value.uses() if user.op_type in _TABLE_MOVES and place == 0]
        waiting += [_move_codes(graph, node, move, ir) for move in moves]
        done += len(moves)
        if moves and not value.uses() and not value.is_graph_output():
            graph.remove(node, safe=True)
    return done


def _is_of_a_table(node: Any, ir: Any) -> bool:
    """Whether a node dequantizes a part of an initializer, int8 with one scale, that is chosen as the file runs."""
    if not _is_dequantize(node) or len(node.inputs) < 3 or not _is_int8_zero(node.inputs[2], ir):
        return False
    codes, scale = node.inputs[0], node.inputs[1].const_value
    while codes.producer() is not None and codes.producer().op_type in {"Gather", *_TABLE_MOVES}:
        codes = codes.producer().inputs[0]
    return codes is not node.inputs[0] and codes.const_value is not None and scale is not None and scale.size == 1


def _move_codes(graph: Any, dequantize: Any, move: Any, ir: Any) -> Any:
    """Puts a move in front of a DequantizeLinear; the new one, of what it moved, is returned."""
    (old,) = move.outputs
    codes = ir.node(move.op_type, [dequantize.inputs[0], *move.inputs[1:]], attributes=dict(move.attributes))
    again = ir.node("DequantizeLinear", [codes.outputs[0], *dequantize.inputs[1:]])
    codes.outputs[0].name, again.outputs[0].name, old.name = f"{old.name}__codes", old.name, f"{old.name}__float"
    codes.outputs[0].type, again.outputs[0].type = ir.TensorType(ir.DataType.INT8), old.type
    codes.outputs[0].shape = again.outputs[0].shape = old.shape
    ir.convenience.replace_all_uses_with(old, again.outputs[0], replace_graph_outputs=True)
    graph.insert_after(move, [codes, again])
    graph.remove(move, safe=True)
    return again


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
