"""Small files for timing, written by hand: layers in a row, each as integers or in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fxquant.onnx.costing.grid import Conv, Product
from fxquant.support.require import require

if TYPE_CHECKING:
    import onnx

INTEGER, PLAIN = "i", "f"
_SCALE, _WEIGHT_SCALE, _LARGEST = np.float32(0.05), np.float32(0.01), 63


class File:
    """One graph in the making; its values are names."""

    def __init__(self) -> None:
        self.onnx: Any = require("onnx")
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.feeds: dict[str, np.ndarray] = {}

    def input(self, shape: Sequence[int], *, codes: bool) -> str:
        """Codes of a byte, or floats."""
        name, helper = f"x{len(self.inputs)}", self.onnx.helper
        kind = self.onnx.TensorProto.UINT8 if codes else self.onnx.TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        made = self.random.integers(0, 255, shape) if codes else self.random.random(shape)
        self.feeds[name] = made.astype(np.uint8 if codes else np.float32)
        return name

    def constant(self, array: Any) -> str:
        """An initializer."""
        name = f"c{len(self.held)}"
        self.held.append(self.onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; its result."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def quantize(self, x: str, zero: int = 0) -> str:
        """Floats → codes."""
        return self.add("QuantizeLinear", x, self.constant(_SCALE), self.constant(np.uint8(zero)))

    def dequantize(self, codes: str, zero: int = 0) -> str:
        """Codes → floats."""
        return self.add("DequantizeLinear", codes, self.constant(_SCALE), self.constant(np.uint8(zero)))

    def weight(self, shape: Sequence[int], axis: int, *, integer: bool) -> str:
        """Of small codes, so that no sum saturates; scales for each channel."""
        codes = self.random.integers(-_LARGEST, _LARGEST, shape).astype(np.int8)
        if not integer:
            return self.constant(codes * _WEIGHT_SCALE)
        scales = np.full(shape[axis], _WEIGHT_SCALE)
        points = np.zeros(shape[axis], np.int8)
        return self.add(
            "DequantizeLinear", self.constant(codes), self.constant(scales), self.constant(points), axis=axis
        )

    def model(self, output: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """The file, and its inputs."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "layers", self.inputs, [self.onnx.ValueInfoProto(name=output)], self.held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return model, self.feeds


Made = tuple["onnx.ModelProto", dict[str, np.ndarray]]


def convolutions(layers: Sequence[tuple[Conv, str]], *, enters: bool = False, leaves: bool = False) -> Made:
    """Convolutions with ReLU in a row, each with its form; as integers from codes to codes.

    ``enters``: the first, of integers, is given floats; ``leaves``: the last gives floats.
    """
    file, (first, form) = File(), layers[0]
    is_codes = form == INTEGER and not enters
    value = file.input((1, first.inputs, first.pixels, first.pixels), codes=is_codes)
    for conv, form in layers:
        if form == INTEGER:
            codes = value if is_codes else file.quantize(value)
            value = file.quantize(_convolution(file, file.dequantize(codes), conv, integer=True))
        else:
            value = _convolution(file, file.dequantize(value) if is_codes else value, conv, integer=False)
            value = file.add("Relu", value)
        is_codes = form == INTEGER
    return file.model(file.dequantize(value) if is_codes and leaves else value)


def _convolution(file: File, x: str, conv: Conv, *, integer: bool) -> str:
    weight = file.weight((conv.outputs, conv.inputs // conv.groups, conv.kernel, conv.kernel), 0, integer=integer)
    bias = file.constant(np.zeros(conv.outputs, np.int32 if integer else np.float32))
    if integer:
        scales = file.constant(np.full(conv.outputs, _SCALE * _WEIGHT_SCALE))
        bias = file.add("DequantizeLinear", bias, scales, file.constant(np.zeros(conv.outputs, np.int32)), axis=0)
    all_around = conv.kernel - max(conv.stride, 1) if conv.stride > 1 else conv.kernel - 1
    all_around = max(0, all_around)
    pads = [all_around // 2] * 2 + [all_around - all_around // 2] * 2
    sides = [conv.kernel] * 2
    return file.add(
        "Conv", x, weight, bias, kernel_shape=sides, strides=[conv.stride] * 2, pads=pads, group=conv.groups
    )


def product(given: Product, form: str, *, enters: bool = False) -> Made:
    """One product, to floats; ``enters``: its first operand comes as floats and is quantized."""
    file, codes = File(), form == INTEGER
    batches = (1, given.batches) if given.batches else (1,)
    value = file.input((*batches, given.rows, given.depth), codes=codes and not enters)
    value = file.quantize(value) if enters else value
    left = file.dequantize(value) if codes else value
    shape = (given.depth, given.columns)
    if given.batches:
        other = file.input((*batches, *shape), codes=codes)
        right = file.dequantize(other, 128) if codes else other
    else:
        right = file.weight(shape, 1, integer=codes)
    return file.model(file.add("MatMul", left, right))


def addition(elements: int, form: str) -> Made:
    """The sum of two tensors; as integers from codes to codes."""
    file, codes = File(), form == INTEGER
    values = [file.input((1, elements), codes=codes) for _ in range(2)]
    operands = map(file.dequantize, values) if codes else values
    total = file.add("Add", *operands)
    return file.model(file.quantize(total) if codes else total)
