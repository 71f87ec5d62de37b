"""Why onnxruntime left a weighted node in float: rules that explain what was seen, and predict nothing.

They were measured on onnxruntime 1.31; where none fits, the row says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.document import Wiring
from fxquant.targets.lint_reader import title

if TYPE_CHECKING:
    import onnx


WEIGHT_ONLY = ("MatMulNBits", "MatMulBnb4")
UNKNOWN = "onnxruntime left it in float: no known rule explains it"

# onnxruntime moves a DequantizeLinear across these to reach the node after them. Flatten is not one.
_CARRIES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Identity", "Dropout")

_WRITE_SUB = "Write the bias as Sub(MatMul, -bias), which stays apart"


def reason(node: onnx.NodeProto, kernel: str, wiring: Wiring) -> str:
    """Why ``node``, which became ``kernel``, does not run on integers."""
    if kernel == "none":
        if all(name in wiring.constants for name in node.input if name):
            return "onnxruntime computed it while loading: all its operands are constants"
        return "no node is left of it: it is unused, equal to another node, or part of a larger fusion"
    if node.op_type == "ConvTranspose":
        return "onnxruntime has no integer kernel for ConvTranspose"
    if node.op_type == "Attention":
        return "onnxruntime has no integer kernel that reads the standard's Attention"
    rules = {"Conv": _conv_reasons, "Gemm": _gemm_reasons, "MatMul": _matmul_reasons}
    why = next(rules[node.op_type](node, kernel, wiring), UNKNOWN)
    if kernel in WEIGHT_ONLY:
        return (
            f"weight-only: {why}; {kernel} rounds the other operand in its own way"
            " unless session.qdq_matmulnbits_accuracy_level is 1"
        )
    return why


def _conv_reasons(node: onnx.NodeProto, kernel: str, wiring: Wiring) -> Iterator[str]:
    yield from _operand_reasons(node, wiring)
    yield from _bias_reasons(node, wiring)
    yield from _output_reasons(node, node.output[0], wiring)


def _gemm_reasons(node: onnx.NodeProto, kernel: str, wiring: Wiring) -> Iterator[str]:
    yield from _operand_reasons(node, wiring)
    biased = len(node.input) > 2 and bool(node.input[2])
    scaled = [a for a in node.attribute if a.name in ("alpha", "beta") and a.f != 1.0 and biased]
    yield from (f"its {a.name} is {a.f:g}: beside a bias, QGemm wants 1" for a in scaled)
    yield from _bias_reasons(node, wiring)
    bias = _operand_source(node, 2, wiring)
    if biased and (bias is None or bias.op_type != "DequantizeLinear"):
        for reason in _output_reasons(node, node.output[0], wiring):
            yield f"a float bias wants an output QuantizeLinear, but {reason}. {_WRITE_SUB}"
    else:
        yield from _output_reasons(node, node.output[0], wiring)


def _matmul_reasons(node: onnx.NodeProto, kernel: str, wiring: Wiring) -> Iterator[str]:
    yield from _operand_reasons(node, wiring)
    readers = wiring.consumers.get(node.output[0], [])
    add = _next_add(node, wiring) if kernel in ("Gemm", "FusedGemm") else None
    if add is not None:
        for reason in [*_added_bias_reasons(add, wiring), *_output_reasons(add, add.output[0], wiring)]:
            yield f"onnxruntime made one float Gemm of it and {title(add)}: {reason}. {_WRITE_SUB}"
    if any(reader.op_type == "QuantizeLinear" for reader in readers):
        yield from _output_reasons(node, node.output[0], wiring)


def _operand_reasons(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    for index in (0, 1):
        subject = f"operand {index} '{node.input[index]}'"
        source = _operand_source(node, index, wiring)
        if source is None or source.op_type != "DequantizeLinear":
            origin = _origin(source, node.input[index] in wiring.constants, wiring)
            yield f"{subject} is not the output of a DequantizeLinear: it {origin}"
            continue
        code = wiring.code_type(source)
        if code not in (None, "INT8", "UINT8"):
            yield f"{subject} holds {str(code).lower()} codes: integer kernels read int8 and uint8"
        scale = wiring.array(source, 1)
        if scale is not None and scale.dtype != "float32":
            yield f"{subject} has {scale.dtype} scales: integer kernels read float32 ones"
        if index == 0 and scale is not None and scale.size > 1:
            yield f"{subject} is quantized per channel: only weights may be"


def _bias_reasons(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    if len(node.input) < 3 or not node.input[2]:
        return
    bias, subject = _operand_source(node, 2, wiring), f"its bias '{node.input[2]}'"
    if bias is not None and bias.op_type == "DequantizeLinear":
        sources = [_operand_source(node, index, wiring) for index in (0, 1)]
        x, w, b = (None if source is None else wiring.array(source, 1) for source in (*sources, bias))
        if x is None or w is None or b is None:
            return
        if not require("numpy").allclose(x * w, b, rtol=1e-4, atol=0.0):
            yield f"{subject} has another scale than operand 0's times operand 1's"
    elif node.input[2] not in wiring.constants:
        yield f"{subject} is neither a constant nor the output of a DequantizeLinear"
    else:
        yield from _shape_reasons(wiring, node, 2)


def _added_bias_reasons(add: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    for index, name in enumerate(add.input):
        if name in wiring.constants:
            yield from _shape_reasons(wiring, add, index)


def _shape_reasons(wiring: Wiring, node: onnx.NodeProto, index: int) -> Iterator[str]:
    tensor = wiring.initializers.get(node.input[index])
    if tensor is not None and (len(tensor.dims) != 1 or tensor.dims[0] == 1):
        subject = f"its bias '{node.input[index]}' has shape {list(tensor.dims)}"
        yield f"{subject}: QGemm wants one dimension, a value per column"


def _output_reasons(node: onnx.NodeProto, value: str, wiring: Wiring) -> Iterator[str]:
    """Why ``value`` is not written as integers: no lone Q, or one that cannot do the clipping."""
    activation: onnx.NodeProto | None = None
    while True:
        readers = wiring.consumers.get(value, [])
        if len(readers) + (value in wiring.outputs) > 1:
            titles = [title(reader) for reader in readers]
            titles += ["the graph's outputs"] * (value in wiring.outputs)
            yield f"its output '{value}' goes to several places: {', '.join(titles)}"
            return
        if not readers:
            yield f"{node.op_type} has no output QuantizeLinear: '{value}' is a graph output"
            return
        reader = readers[0]
        if reader.op_type == "QuantizeLinear":
            break
        if reader.op_type in ("Relu", "Clip") and activation is None:
            activation = reader
        elif reader.op_type not in ("Identity", "Dropout"):
            after = "" if activation is None else f", after {title(activation)}"
            yield f"{node.op_type} has no output QuantizeLinear: '{value}' goes to {title(reader)}{after}"
            return
        value = reader.output[0]
    code = wiring.code_type(reader)
    if code not in (None, "INT8", "UINT8"):
        yield f"its output is quantized to {str(code).lower()}: integer kernels write int8 and uint8"
    elif activation is not None:
        yield from _activation_reasons(activation, reader, wiring)


def _activation_reasons(activation: onnx.NodeProto, q: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    """A Relu or Clip goes away only where the range of ``q`` clips at least as tightly."""
    np = require("numpy")
    scale, zero_point = wiring.array(q, 1), wiring.array(q, 2)
    if scale is None or zero_point is None or scale.size != 1:
        return
    limits = np.iinfo(zero_point.dtype)
    if activation.op_type == "Relu":
        if zero_point != limits.min:
            yield (
                f"{title(activation)} stays a node of its own: the zero point of {title(q)} is"
                f" {int(zero_point)}, and only {limits.min} clips as a Relu does"
            )
        return
    low, high = ((float(limit) - float(zero_point)) * float(scale) for limit in (limits.min, limits.max))
    bounds = [wiring.array(activation, index) for index in (1, 2)]
    floor, ceiling = (default if b is None else float(b) for b, default in zip(bounds, (-np.inf, np.inf), strict=True))
    if low < floor or high > ceiling:
        yield (
            f"{title(activation)} stays a node of its own: {title(q)} covers [{low:g}, {high:g}],"
            f" which is not inside [{floor:g}, {ceiling:g}]"
        )


def _operand_source(node: onnx.NodeProto, index: int, wiring: Wiring) -> onnx.NodeProto | None:
    """Who computes the operand, seen through the ops that carry a DequantizeLinear, ``None`` if none does."""
    source = wiring.producer.get(node.input[index]) if index < len(node.input) else None
    while source is not None and source.op_type in _CARRIES and source.input[0] in wiring.producer:
        source = wiring.producer[source.input[0]]
    return None if source is None or source.op_type == "Constant" else source


def _origin(source: onnx.NodeProto | None, constant: bool, wiring: Wiring) -> str:
    if source is None:
        return "is a constant" if constant else "is a graph input"
    before = _operand_source(source, 0, wiring) if source.op_type == "Flatten" else None
    quantized = before is not None and before.op_type == "DequantizeLinear"
    advice = ", where a Reshape would carry the integers on" if quantized else ""
    return f"comes from {title(source)}{advice}"


def _next_add(node: onnx.NodeProto, wiring: Wiring) -> onnx.NodeProto | None:
    """The Add that reads ``node``, seen through what onnxruntime removes first (such as a product by one)."""
    while len(readers := wiring.consumers.get(node.output[0], [])) == 1:
        node = readers[0]
        if node.op_type == "Add":
            return node
        if node.op_type not in ("Identity", "Dropout", "Mul", "Div"):
            break
    return None
