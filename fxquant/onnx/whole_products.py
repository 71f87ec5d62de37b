"""Products of codes that a runtime would take apart where their result is split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_PRODUCTS = ("MatMul", "Gemm", "Einsum")
_CARRIES = ("Add", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")


def keep_products_whole(graph: Any) -> int:
    """``MatMul(x, DQ(codes, scales)) → … → Split in three``  →  ``MatMul → Mul(·, 1) → … → Split in three``.

    Query, key and value of one layer. TensorRT for RTX 1.7.1 splits the weight instead, after the DequantizeLinear, so
    that three floats are multiplied; nothing is moved across the Mul, which goes into the kernel after the product.
    The same numbers. Where the scales are one a channel: others it leaves alone. Returns how many Mul it wrote.
    """
    import numpy as np
    import onnx_ir as ir

    done = 0
    for node in [node for node in graph if node.op_type in _PRODUCTS]:
        (result,) = node.outputs
        if not any(map(_has_channels, node.inputs[:2])) or len(list(_parts(result))) != 3:
            continue
        name = f"{result.name}_whole"
        tensor = ir.tensor(np.float32(1), name=f"{name}_one")
        one = ir.Value(name=tensor.name, shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(one)
        times = ir.node("Mul", inputs=[result, one], name=name)
        (whole,) = times.outputs
        whole.name, whole.shape, whole.type = name, result.shape, result.type
        for user, index in list(result.uses()):
            if user is not times:
                user.replace_input_with(index, whole)
        graph.insert_after(node, times)
        done += 1
    return done


def _has_channels(value: Any) -> bool:
    """Whether an operand is codes with a scale per channel, as they are or transposed."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0].const_value is None:
        return False
    block, scale = node.attributes.get("block_size"), node.inputs[1].const_value
    return (block is None or block.as_int() == 0) and scale is not None and scale.size > 1


def _parts(value: Any) -> Iterator[Any]:
    """Slices of a value, by what carries it."""
    for user, _ in value.uses():
        if user.op_type == "Split":
            yield from (part for part in user.outputs if part.uses())
        elif user.op_type in ("Slice", "Gather"):
            yield user.outputs[0]
        elif user.op_type in _CARRIES:
            yield from _parts(user.outputs[0])
