"""Pools of pictures in the form that onnxruntime runs fast: maxima of floats, means by one axis after the other."""

from __future__ import annotations

from typing import Any

from fxquant.onnx.runtime_forms import MOVES

_JOINS = frozenset({"Add", "Concat", "AveragePool", "MaxPool"})  # of codes, in the layout that these have
_BY_ELEMENT = {
    *("Relu", "Clip", "Max"),
    *("QuantizeLinear", "DequantizeLinear", "QuickGelu", "Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf"),
    *("Gelu", "Add", "Sub", "Sum", "Div", "Min", "LeakyRelu", "Elu", "Softplus", "Mish", "Swish"),
}


def pool_floats(graph: Any) -> int:
    """Of an ``x`` that no integer convolution is before, through sums, Concats and operators by element::

        MaxPool(DQ(Q(x)))  →  DQ(Q(Sum(MaxPool(Sum(DQ(Q(x)))))))    with the same scale and zero point

    The same codes: values on the grid stay there. onnxruntime's integer MaxPool is fast in the layout of a QLinearConv,
    faster than a pool of floats there (GoogLeNet 9.1 ms, with these 10.1); after a float operator it is a plain loop, a
    hundred times as slow as the float pool. It moves quantizers across a MaxPool, up and down, into that loop: a Sum,
    of one operand, stops them. Returns how many pools it changed.
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


def means_by_axis(graph: Any) -> int:
    """``ReduceMean(x, axes=(2, 3))``  →  ``ReduceMean(ReduceMean(x, 3), 2)``, where an integer convolution made x.

    The same up to a last bit. There channels are the last axis (onnxruntime moves its transposes down to the mean), and
    a mean over two axes in the middle goes number by number, one over one axis by vectors: the 17 of EfficientNet-B0
    take 1.8 ms, and 0.6 so. In the other order of axes they take longer, and so they do after a float convolution,
    where two that were written so become one again. A mean between codes is left. Returns how many are written by axis.
    """
    import onnx_ir as ir

    _join_means(graph)
    means = [node for node in graph if _is_mean(node, [2, 3]) and not _is_of_codes(node)]
    found = [node for node in means if _is_of_integers(node.inputs[0])]
    for node in found:
        keep = node.attributes.get("keepdims")
        keeps = keep is None or bool(keep.as_int())
        inner = ir.node("ReduceMean", [node.inputs[0], _axes(graph, 3)], {"keepdims": int(keeps)})
        (row,), (mean,), shape = inner.outputs, node.outputs, node.inputs[0].shape
        row.name, row.type = f"{mean.name}__rows", mean.type
        row.shape = ir.Shape([*shape[:3], 1] if keeps else shape[:3])
        graph.insert_before(node, inner)
        node.replace_input_with(0, row)
        node.replace_input_with(1, _axes(graph, 2))
    return len(found)


def _join_means(graph: Any) -> None:
    """Two means by axis that no integer convolution is before become one."""
    for node in [node for node in graph if node.op_type == "ReduceMean" and _axes_of(node) == [2]]:
        inner = node.inputs[0].producer()
        is_pair = inner is not None and _is_mean(inner, [3]) and len(inner.outputs[0].uses()) == 1
        if is_pair and not _is_of_integers(inner.inputs[0]):
            node.replace_input_with(0, inner.inputs[0])
            node.replace_input_with(1, _axes(graph, 2, 3))
            graph.remove(inner, safe=True)


def _axes(graph: Any, *numbers: int) -> Any:
    """The initializer that holds them."""
    import numpy as np
    import onnx_ir as ir

    name = "_".join(["mean_axes", *map(str, numbers)])
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape((len(numbers),)), type=ir.TensorType(ir.DataType.INT64))
        value.const_value = ir.tensor(np.array(numbers), name=name)
        graph.register_initializer(value)
    return graph.initializers[name]


def _axes_of(node: Any) -> list[int] | None:
    """Of a mean over a picture with its batch, from the front."""
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return None if axes is None else sorted(int(axis) % 4 for axis in axes.numpy().ravel())


def _is_mean(node: Any, axes: list[int]) -> bool:
    """Whether it is the mean of four axes over these."""
    shape = node.inputs[0].shape if node.op_type == "ReduceMean" else None
    return shape is not None and len(shape) == 4 and _axes_of(node) == axes


def _is_of_codes(node: Any) -> bool:
    """Whether a runtime may take the mean of codes: a DequantizeLinear before it, a QuantizeLinear after it."""
    before, users = node.inputs[0].producer(), {user.op_type for user, _ in node.outputs[0].uses()}
    return before is not None and before.op_type == "DequantizeLinear" and "QuantizeLinear" in users


def _pair_of(value: Any) -> tuple[Any, Any] | None:
    """The QuantizeLinear and the DequantizeLinear that a value comes out of."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = dequantize.inputs[0].producer()
    return (quantize, dequantize) if quantize is not None and quantize.op_type == "QuantizeLinear" else None


def _is_of_integers(value: Any) -> bool:
    """Whether integer convolutions make a value: alone, joined as codes, or with operators by element after them.

    Their layout goes along through all of these. Of several operands by element the first is looked at.
    """
    waiting, seen = [value], set[Any]()
    while waiting:
        node = waiting.pop().producer()
        while node is not None and node.op_type in _BY_ELEMENT | MOVES and not _joined(node):
            node = node.inputs[0].producer()
        if node is None or not (_joined(node) or _is_integer_conv(node)):
            return False
        waiting += _joined(node) if node not in seen else []
        seen.add(node)
    return True


def _joined(node: Any) -> list[Any]:
    """What was quantized for an operator that joins codes; nothing of others."""
    pairs = [_pair_of(each) for each in node.inputs] if node.op_type in _JOINS else []
    return [] if None in pairs else [quantize.inputs[0] for quantize, _ in filter(None, pairs)]


def _is_integer_conv(node: Any) -> bool:
    before = node.inputs[0].producer() if node.op_type == "Conv" else None
    while before is not None and before.op_type in MOVES:
        before = before.inputs[0].producer()
    return before is not None and before.op_type == "DequantizeLinear"
