"""Max pools over codes of what a float operator makes are taken of floats: onnxruntime's pool of such codes is slow."""

from __future__ import annotations

from typing import Any

_FUSED = frozenset({"Relu", "Clip", "Max"})


def pool_floats(graph: Any) -> int:
    """Of an ``x`` that no integer convolution makes::

        MaxPool(DQ(Q(x)))  →  DQ(Q(Sum(MaxPool(Sum(DQ(Q(x)))))))    with the same scale and zero point

    The same codes: values on the grid stay there. onnxruntime's integer MaxPool is fast after a QLinearConv, whose
    layout it has; after a float operator it is a plain loop, a hundred times as slow as the float pool. It moves
    quantizers across a MaxPool, up and down, into that loop: a Sum, of one operand, stops them. Returns how many pools
    it changed.
    """
    import onnx_ir as ir

    done = 0
    for pool in [node for node in graph if node.op_type == "MaxPool" and len(node.outputs) == 1]:
        pair = _pair_of(pool.inputs[0])
        if pair is None or _is_of_integers(pair[0].inputs[0]):
            continue
        quantize, dequantize = pair
        (old,), given = pool.outputs, pool.inputs[0]
        before, after = ir.node("Sum", [given]), ir.node("Sum", [old])
        codes = ir.node("QuantizeLinear", [after.outputs[0], *quantize.inputs[1:]], quantize.attributes)
        again = ir.node("DequantizeLinear", [codes.outputs[0], *dequantize.inputs[1:]], dequantize.attributes)
        for word, node, like in (
            ("given", before, given),
            ("pooled", after, old),
            ("codes", codes, old),
            ("again", again, old),
        ):
            (value,) = node.outputs
            value.name, value.shape, value.type = f"{old.name}__{word}", like.shape, old.type
        codes.outputs[0].type = quantize.outputs[0].type
        ir.convenience.replace_all_uses_with(old, again.outputs[0], replace_graph_outputs=True)
        after.replace_input_with(0, old)
        pool.replace_input_with(0, before.outputs[0])
        graph.insert_before(pool, before)
        graph.insert_after(pool, [after, codes, again])
        done += 1
    return done


def _pair_of(value: Any) -> tuple[Any, Any] | None:
    """The QuantizeLinear and the DequantizeLinear that a value comes out of."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = dequantize.inputs[0].producer()
    return (quantize, dequantize) if quantize is not None and quantize.op_type == "QuantizeLinear" else None


def _is_of_integers(value: Any) -> bool:
    """Whether a convolution of codes makes a value, alone or with what is fused into it."""
    node = value.producer()
    while node is not None and node.op_type in _FUSED:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Conv":
        return False
    before = node.inputs[0].producer()
    return before is not None and before.op_type == "DequantizeLinear"
