"""Weights that a runtime is to unpack as it loads a file, and not in each run of it."""

from __future__ import annotations

from typing import Any

_RECURRENT = ("LSTM", "GRU")
_MOVES = ("Slice", "Concat", "Unsqueeze")  # from torch's order of the gates to ONNX's


def unpack_recurrent_weights(model: Any) -> None:
    """Writes the weights of recurrent layers as products that a runtime computes as it loads the file::

        DequantizeLinear(codes, scale, 0, axis=0)  →  Mul(Cast(codes, FLOAT), scale[N, 1])

    The same floats. onnxruntime runs a DequantizeLinear before an LSTM each time, and packs weights that it computes
    for none of its kernels: 10.5 ms for 32 steps of 256 units, where floats and this take 1.4.
    """
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "DequantizeLinear" and _is_of_recurrent(node)]:
        codes, scale, *rest = node.inputs
        if rest and (rest[0].const_value is None or rest[0].const_value.numpy().any()):
            continue  # weights that are not symmetric
        array = scale.const_value.numpy()
        array = array.reshape(*array.shape, *[1] * (len(codes.shape) - 1) * array.ndim)
        name = f"{scale.name}_column"
        column = ir.tensor(array, name=name)
        held = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(column.dtype), const_value=column)
        model.graph.register_initializer(held)
        cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], held], outputs=[ir.Value(name=f"{node.outputs[0].name}_unpacked")])
        product.outputs[0].shape, product.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, [cast, product])
        ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
        model.graph.remove(node, safe=True)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]


def _is_of_recurrent(node: Any) -> bool:
    """Whether a weight is read by recurrent layers alone."""
    uses = [use.node for value in node.outputs for use in value.uses()]
    return bool(uses) and all(
        user.op_type in _RECURRENT or (user.op_type in _MOVES and _is_of_recurrent(user)) for user in uses
    )
