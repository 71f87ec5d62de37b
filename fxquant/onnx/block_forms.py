"""Activations that are quantized by scales of their own, in the form that their target runs.

::

    QuantizeLinear → DequantizeLinear, which stand for it, by the name of the codes
    →   standard    scale (and zero point) of each row or block computed by ONNX's own operators, then Q/DQ with it
    →   "integer"   the same, and what multiplies rows of it by an int8 weight a MatMulInteger of the codes
    →   "trt"       trt::TRT_FP4DynamicQuantize, trt::TRT_MXFP8DynamicQuantize, and what reads their results
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fxquant.errors import ExportError
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.numerics.storage import storage
from fxquant.onnx.element_types import onnx_type
from fxquant.ops.qparams import ACTIVATION_SCALE_FLOOR
from fxquant.passes.export.freeze import Blocks
from fxquant.support.require import require

_FLOAT, _E4M3, _E2M1, _UINT8, _INT32 = 1, 17, 23, 2, 6  # onnx.TensorProto.DataType
_E8M0_MIN = 2.0**-127
_SMALLEST_NORMAL = 2.0**-126


def write_blocks(model: Any, blocks: Mapping[str, Blocks], form: str) -> None:
    """Replaces the pairs that stand for activations in blocks, each by the nodes of ``form``."""
    pairs = {node.outputs[0].name: node for node in model.graph if node.op_type == "QuantizeLinear"}
    for label, found in blocks.items():
        if label not in pairs:  # joined with an equal one
            continue
        quantize = pairs[label]
        (dequantize,) = (use.node for use in quantize.outputs[0].uses())
        quantize.outputs[0].name = f"{label}_replaced"
        nodes = _Nodes(model.graph, quantize, label)
        result = _in_trt(nodes, found) if form == "trt" else _in_onnx(nodes, found)
        _put(result, dequantize.outputs[0])
        model.graph.remove([quantize, dequantize], safe=True)
        if form == "integer" and found.size < 0:
            _multiply_codes(nodes, result)
    if form == "trt":
        _write_mx_weights(model)
        if any(node.domain == "trt" for node in model.graph):
            model.opset_imports["trt"] = 1


def _put(new: Any, old: Any) -> None:
    """A value in another's place, under its name where that is an output's."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _write_mx_weights(model: Any) -> None:
    """``DQ(codes[K, N], scales, axis 0)``  →  ``Transpose(trt::TRT_MXFP8DequantizeLinear(codesᵀ, exponents))``.

    Of fp8 codes in blocks of 32: TensorRT has scales that are powers of two as bytes, along the last axis alone.
    """
    np = require("numpy")
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes, scale = node.inputs[0].const_value, node.inputs[1].const_value
        size = node.attributes.get("block_size")
        is_fp8 = codes is not None and codes.dtype.value == _E4M3 and size is not None and size.as_int() == 32
        if not is_fp8 or scale is None:
            continue
        axis, steps = node.attributes["axis"].as_int() % 2, scale.numpy()
        mantissa, exponent = np.frexp(steps)
        if (mantissa != 0.5).any():
            continue
        nodes = _Nodes(model.graph, node, node.inputs[0].name)
        turned = [codes.numpy(), (exponent - 1 + 127).astype(np.uint8)]
        if axis == 0:
            turned = [np.ascontiguousarray(each.T) for each in turned]
        held = [nodes.constant(each) for each in turned]
        value = nodes.make(
            "TRT_MXFP8DequantizeLinear", *held, domain="trt", axis=-1, block_size=32, output_dtype=_FLOAT
        )
        if axis == 0:
            value = nodes.make("Transpose", value, perm=[1, 0])
        _put(value, node.outputs[0])
        model.graph.remove(node, safe=True)


class _Nodes:
    """Makes nodes in front of a pair, each after the one before."""

    def __init__(self, graph: Any, before: Any, label: str) -> None:
        self.ir, self.graph, self.before, self.label = require("onnx_ir"), graph, before, label
        self.input = before.inputs[0]
        self.count = 0

    def make(self, op: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node, its result or its results."""
        node = self.ir.node(op, inputs=list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"{self.label}_blocks{self.count}"
            self.count += 1
        node.name = f"{self.label}_{op}{self.count}"
        self.graph.insert_before(self.before, node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def type(self, kind: int) -> Any:
        """The type of a tensor of ONNX's data type ``kind``."""
        return self.ir.TensorType(self.ir.DataType(kind))

    def constant(self, value: Any) -> Any:
        """An initializer of an array, or of a number in float32."""
        np = require("numpy")
        array = np.asarray(value, dtype=np.float32) if isinstance(value, float) else np.asarray(value)
        name = f"{self.label}_constant{self.count}"
        self.count += 1
        tensor = self.ir.tensor(array, name=name)
        made = self.ir.Value(
            name=name, shape=self.ir.Shape(array.shape), type=self.ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(made)
        return made


def _in_trt(nodes: _Nodes, found: Blocks) -> Any:
    """TensorRT's own operators, along the last axis."""
    if (found.element, found.scale_format, found.size) == ("e2m1", "e4m3", 16):
        if found.tensor_amax is None:
            raise ExportError(
                f"the range of {nodes.label} must be known before it runs, for TensorRT: got that of each tensor. "
                "Prepare with ranges='moving_average'."
            )
        unit = nodes.constant(_unit(found))
        codes, scales = nodes.make(
            "TRT_FP4DynamicQuantize",
            nodes.input,
            unit,
            domain="trt",
            outputs=2,
            axis=-1,
            block_size=16,
            scale_type=_E4M3,
        )
        codes.name, codes.type, scales.type = nodes.label, nodes.type(_E2M1), nodes.type(_E4M3)
        steps = nodes.make("DequantizeLinear", scales, unit)
        steps.type = nodes.type(_FLOAT)
        return nodes.make("DequantizeLinear", codes, steps, axis=-1, block_size=16)
    if (found.element, found.scale_format, found.size) == ("e4m3", "e8m0", 32):
        codes, scales = nodes.make(
            "TRT_MXFP8DynamicQuantize", nodes.input, domain="trt", outputs=2, axis=-1, block_size=32, output_dtype=_E4M3
        )
        codes.name, codes.type = nodes.label, nodes.type(_E4M3)
        return nodes.make(
            "TRT_MXFP8DequantizeLinear", codes, scales, domain="trt", axis=-1, block_size=32, output_dtype=_FLOAT
        )
    raise ExportError(
        f"{nodes.label} must be in blocks of a form that TensorRT quantizes, e2m1 in 16 with e4m3 scales or e4m3 in 32 "
        f"with e8m0 scales: got {found}."
    )


def _multiply_codes(nodes: _Nodes, value: Any) -> None:
    """``MatMul(Reshape(DQ(codes, rows)), DQ(weight, columns))``  →  ``MatMulInteger(codes, weight) · rows · columns``.

    For weights of int8 codes with a scale each column; float32 takes the sums of products, as integers, exactly up to
    2^24 and rounds them once beyond. Of rows with zero points ``zero point · sum of the column`` is subtracted before.
    """
    dequantize, shape = (each for each in (value.producer().inputs[0].producer(), value.producer().inputs[1]))
    codes, scale = dequantize.inputs[:2]
    point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    np = require("numpy")
    if codes.dtype.name not in ("INT8", "UINT8"):
        return
    for use in list(value.uses()):
        product, weight = use.node, use.node.inputs[1].producer() if len(use.node.inputs) > 1 else None
        if product.op_type != "MatMul" or use.idx != 0 or weight is None or weight.op_type != "DequantizeLinear":
            continue
        axis = weight.attributes.get("axis")
        is_int8 = weight.inputs[0].const_value is not None and weight.inputs[0].const_value.dtype.name == "INT8"
        single = weight.inputs[1].const_value.numpy().size == 1
        if not is_int8 or not (single or (axis is not None and axis.as_int() == 1)):
            continue
        nodes.before = product
        total = nodes.make("MatMulInteger", codes, weight.inputs[0])
        total.producer().name = product.name
        column = nodes.constant(np.array([-1, 1], dtype=np.int64))
        if point is not None:
            columns = nodes.constant(weight.inputs[0].const_value.numpy().sum(0, dtype=np.int32))
            each = nodes.make("Reshape", nodes.make("Cast", point, to=_INT32), column)
            total = nodes.make("Sub", total, nodes.make("Mul", each, columns))
        total = nodes.make("Cast", total, to=_FLOAT)
        total = nodes.make("Mul", total, nodes.make("Reshape", scale, column))
        total = nodes.make("Mul", total, weight.inputs[1])
        last = nodes.constant(np.array([weight.inputs[0].const_value.shape[1]], dtype=np.int64))
        kept = nodes.make("Slice", shape, *(nodes.constant(np.array([each], dtype=np.int64)) for each in (0, -1)))
        whole = nodes.make("Reshape", total, nodes.make("Concat", kept, last, axis=0))
        _put(whole, product.outputs[0])
        nodes.graph.remove(product, safe=True)
        if not weight.outputs[0].uses():  # codes that two nodes read, onnxruntime may refuse: see own_zero_points
            nodes.graph.remove(weight, safe=True)


def _unit(found: Blocks) -> float:
    """The one float32 scale of a tensor: `fxquant.numerics.blocks.tensor_unit`."""
    import torch

    from fxquant.numerics.blocks import IntegerGrid, tensor_unit

    element = IntegerGrid(0, found.quant_max) if found.element is None else FLOAT_FORMATS[found.element]
    return float(tensor_unit(torch.tensor(found.tensor_amax), element, FLOAT_FORMATS["e4m3"]))


def _in_onnx(nodes: _Nodes, found: Blocks) -> Any:
    """The scale of each row or block by standard operators, then Q/DQ with it."""
    if found.has_zero_points:
        return _in_onnx_with_zero_points(nodes, found)
    np = require("numpy")
    largest = float(found.quant_max) if found.element is None else FLOAT_FORMATS[found.element].max
    kind = storage(found.quant_min, found.quant_max)[0] if found.element is None else onnx_type(found.element)
    shape = None
    rows = nodes.input
    if found.size > 0:
        shape = nodes.make("Shape", nodes.input)
        split = [0] * (len(nodes.input.shape) - 1) + [-1, found.size]
        rows = nodes.make("Reshape", nodes.input, nodes.constant(np.array(split, dtype=np.int64)))
    amax = nodes.make("ReduceMax", nodes.make("Abs", rows), nodes.constant(np.array([-1], dtype=np.int64)), keepdims=1)
    scale = _scale(nodes, found, amax, largest)
    if found.size > 0:  # one scale a block: [..., blocks]
        scale = nodes.make("Squeeze", scale, nodes.constant(np.array([-1], dtype=np.int64)))
        options: dict[str, Any] = {"axis": -1, "block_size": found.size}
        x = nodes.input
    else:  # one scale a row: QuantizeLinear has them along an axis of a matrix
        x, shape = _rows(nodes)
        scale = nodes.make("Reshape", scale, nodes.constant(np.array([-1], dtype=np.int64)))
        options = {"axis": 0}
    divisor = scale
    if found.scale_format == "e4m3":  # a block that rounds to no scale at all
        is_zero = nodes.make("Equal", scale, nodes.constant(0.0))
        divisor = nodes.make("Where", is_zero, nodes.constant(1.0), scale)
    output = _E2M1 if found.element == "e2m1" else nodes.ir.DataType.from_numpy(np.dtype(kind)).value
    codes = nodes.make("QuantizeLinear", x, divisor, **options, output_dtype=int(output))
    codes.name, codes.type = nodes.label, nodes.type(int(output))
    value = nodes.make("DequantizeLinear", codes, scale, **options)
    return value if found.size > 0 else nodes.make("Reshape", value, shape)


def _rows(nodes: _Nodes) -> tuple[Any, Any]:
    """The input as a matrix of rows, and the shape to come back to."""
    np = require("numpy")
    length = int(nodes.input.shape[-1])
    rows = nodes.make("Reshape", nodes.input, nodes.constant(np.array([-1, length], dtype=np.int64)))
    return rows, nodes.make("Shape", nodes.input)


def _in_onnx_with_zero_points(nodes: _Nodes, found: Blocks) -> Any:
    """Scale and zero point of each row, as `fxquant.ops.affine_qparams` has them, then Q/DQ with both."""
    np = require("numpy")
    name, *limits = storage(found.quant_min, found.quant_max)
    kind = nodes.ir.DataType.from_numpy(np.dtype(name)).value
    rows, shape = _rows(nodes)
    along, column = nodes.constant(np.array([-1], dtype=np.int64)), nodes.constant(np.array([-1, 1], dtype=np.int64))
    zero = nodes.constant(0.0)
    low = nodes.make("Min", nodes.make("ReduceMin", rows, along, keepdims=0), zero)
    high = nodes.make("Max", nodes.make("ReduceMax", rows, along, keepdims=0), zero)
    count = found.quant_max - found.quant_min
    if found.symmetric:
        reach = nodes.make("Max", nodes.make("Neg", low), high)
        scale = nodes.make("Div", reach, nodes.constant(float(count // 2)))
    else:
        scale = nodes.make("Div", nodes.make("Sub", high, low), nodes.constant(float(count)))
    ends = nodes.constant(ACTIVATION_SCALE_FLOOR), nodes.constant(float(np.finfo(np.float32).max))
    scale = nodes.make("Clip", scale, *ends)
    least, most = (nodes.constant(float(limit)) for limit in (found.quant_min, found.quant_max))
    if found.symmetric:
        middle = nodes.constant(float((found.quant_min + found.quant_max + 1) // 2))
        place = nodes.make("Add", nodes.make("Mul", scale, zero), middle)
    else:
        place = nodes.make("Sub", least, nodes.make("Round", nodes.make("Div", low, scale)))
        place = nodes.make("Clip", place, least, most)
    if [found.quant_min, found.quant_max] != limits:  # the type is wider than the range
        edges = [nodes.make("Mul", nodes.make("Sub", limit, place), scale) for limit in (least, most)]
        start, end = (nodes.make("Reshape", edge, column) for edge in edges)
        rows = nodes.make("Min", nodes.make("Max", rows, start), end)
    point = nodes.make("Cast", place, to=int(kind))
    codes = nodes.make("QuantizeLinear", rows, scale, point, axis=0)
    codes.name, codes.type = nodes.label, nodes.type(int(kind))
    value = nodes.make("DequantizeLinear", codes, scale, point, axis=0)
    return nodes.make("Reshape", value, shape)


def _scale(nodes: _Nodes, found: Blocks, amax: Any, largest: float) -> Any:
    """As `fxquant.ops.qparams` has it, with a last axis of 1."""
    if found.scale_format == "e8m0":
        return _power_of_two(nodes, amax, math.frexp(largest)[1] - 1)
    full = nodes.make("Div", amax, nodes.constant(largest))
    if found.scale_format is None:
        return nodes.make("Max", full, nodes.constant(2.0**-60))
    if found.tensor_amax is None:
        whole = nodes.make("ReduceMax", amax, keepdims=0)
        unit = nodes.make("Div", whole, nodes.constant(largest * 448.0))
        unit = nodes.make("Where", nodes.make("Greater", unit, nodes.constant(0.0)), unit, nodes.constant(1.0))
    else:
        unit = nodes.constant(_unit(found))
    zero = nodes.constant(require("numpy").zeros((), dtype=onnx_type("e4m3")))
    codes = nodes.make("QuantizeLinear", full, unit, zero)
    return nodes.make("DequantizeLinear", codes, unit, zero)


def _power_of_two(nodes: _Nodes, amax: Any, exponent: int) -> Any:
    """``2^(floor(log2 amax) − exponent)``: what a logarithm is off by is put right by comparison."""
    amax = nodes.make("Max", amax, nodes.constant(_SMALLEST_NORMAL))
    log = nodes.make("Div", nodes.make("Log", amax), nodes.constant(math.log(2.0)))
    power = nodes.make("Pow", nodes.constant(2.0), nodes.make("Floor", log))
    half = nodes.make("Mul", power, nodes.constant(0.5))
    power = nodes.make("Where", nodes.make("Greater", power, amax), half, power)
    twice = nodes.make("Mul", power, nodes.constant(2.0))
    power = nodes.make("Where", nodes.make("LessOrEqual", twice, amax), twice, power)
    return nodes.make("Max", nodes.make("Mul", power, nodes.constant(2.0**-exponent)), nodes.constant(_E8M0_MIN))
