"""A file of a half type as one of float32 with the same numbers, for a runtime that has no such kernels on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxquant.support.require import require

if TYPE_CHECKING:
    import onnx

_HALVES = (10, 16)  # TensorProto.FLOAT16, BFLOAT16
_FLOAT, _BFLOAT16 = 1, 16
_WIDE = "::wide"
_DTYPES = ("to", "dtype", "output_dtype", "output_datatype")


def is_beyond_onnxruntime(model: onnx.ModelProto) -> bool:
    """Whether onnxruntime's CPU kernels lack the model's types: bfloat16, or Q/DQ of float16 with float32 scales.

    onnxruntime 1.31 has no kernel for the first, and reads the scale in the type of the tensor in the second.
    """
    graph = model.graph
    edges = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    if _BFLOAT16 in edges or any(tensor.data_type == _BFLOAT16 for tensor in graph.initializer):
        return True
    return any(_makes(node) in _HALVES and (node.op_type in _QDQ or _makes(node) == _BFLOAT16) for node in graph.node)


_QDQ = ("QuantizeLinear", "DequantizeLinear")


def rounded(model: onnx.ModelProto, folder: str) -> onnx.ModelProto:
    """The model in float32, each result that was half rounded to it, as a kernel does that adds up in float32::

        y16 = Op(x16)   →   y = Cast(Cast(Op(x), FLOAT16), FLOAT)

    Names stay, so do codes; inputs and outputs that were half are float32. ``folder``: where its external data lies.
    """
    onnx = require("onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.load_external_data_for_model(copy, folder)
    types = _types(onnx.shape_inference.infer_shapes(copy).graph)
    _round(copy.graph, types)
    return copy


def _makes(node: onnx.NodeProto) -> int:
    """The type that a node's attribute says for its result, 0 where none does."""
    return next((a.i for a in node.attribute if a.name in _DTYPES), 0)


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type by name, of bodies too."""
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    found.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    for node in graph.node:
        for body in _bodies(node):
            found.update(_types(body))
    return found


def _bodies(node: onnx.NodeProto) -> list[Any]:
    return [body for a in node.attribute for body in [*a.graphs, *([a.g] if a.HasField("g") else [])]]


def _round(graph: onnx.GraphProto, types: dict[str, int]) -> None:
    for tensor in graph.initializer:
        _widen(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = _FLOAT
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for body in _bodies(node):
            _round(body, types)
        halves = [(index, types[name]) for index, name in enumerate(node.output) if types.get(name) in _HALVES]
        _in_float32(node)
        names = [(node.output[index], kind) for index, kind in halves]
        for index, _ in halves:
            node.output[index] += _WIDE
        graph.node.append(node)
        for name, kind in names:
            graph.node.extend(_rounding(name, kind))


def _in_float32(node: onnx.NodeProto) -> None:
    """A node's own types and tensors of half, as float32."""
    for attribute in list(node.attribute):
        if attribute.HasField("t"):
            _widen(attribute.t)
        if attribute.name in _DTYPES and attribute.i in _HALVES:
            if node.op_type in _QDQ:
                node.attribute.remove(attribute)
            else:
                attribute.i = _FLOAT


def _rounding(name: str, kind: int) -> list[Any]:
    """From a value as it was computed to the one that the file has."""
    helper = require("onnx").helper
    return [
        helper.make_node("Cast", [name + _WIDE], [f"{name}::half"], to=kind),
        helper.make_node("Cast", [f"{name}::half"], [name], to=_FLOAT),
    ]


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALVES:
        helper = require("onnx.numpy_helper")
        tensor.CopyFrom(helper.from_array(helper.to_array(tensor).astype("float32"), tensor.name))
