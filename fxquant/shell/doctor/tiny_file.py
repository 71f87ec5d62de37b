"""The smallest file that is quantized, and what it must give: powers of two, so that every runtime is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxquant.support.require import require

if TYPE_CHECKING:
    import numpy as np
    import onnx

ROWS, WIDTH, COLUMNS = 2, 8, 4
SCALE, WEIGHT_SCALE = 1 / 16, 1 / 32
LARGEST_WEIGHT = 31  # no sum of two products leaves 16 bits, on a CPU without integer dot products either


def inputs() -> dict[str, np.ndarray]:
    """``x``: codes from -64 to 63, as floats."""
    numpy = require("numpy")
    codes = numpy.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) * 37 % 128 - 64
    return {"x": (codes * SCALE).astype(numpy.float32)}


def _weight() -> np.ndarray:
    numpy = require("numpy")
    spread = numpy.arange(WIDTH * COLUMNS).reshape(WIDTH, COLUMNS) * 23 % (2 * LARGEST_WEIGHT + 1)
    codes: np.ndarray = (spread - LARGEST_WEIGHT).astype(numpy.int8)
    return codes


def model() -> onnx.ModelProto:
    """``x → QuantizeLinear → DequantizeLinear → MatMul(·, DequantizeLinear(int8 weight)) → y``, opset 19."""
    onnx, numpy = require("onnx"), require("numpy")
    helper, constant = onnx.helper, onnx.numpy_helper.from_array
    zero = numpy.zeros((), numpy.int8)
    constants = {"scale": numpy.float32(SCALE), "zero": zero, "codes": _weight(), "step": numpy.float32(WEIGHT_SCALE)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["w"]),
        helper.make_node("MatMul", ["dq", "w"], ["y"], name="product"),
    ]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [ROWS, WIDTH]), ("y", [ROWS, COLUMNS]))
    ]
    held = [constant(numpy.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "doctor", values[:1], values[1:], initializer=held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def check(outputs: Sequence[np.ndarray]) -> None:
    """Raises where they are not the standard's."""
    numpy = require("numpy")
    expected = (inputs()["x"].astype(numpy.float64) @ (_weight() * WEIGHT_SCALE)).astype(numpy.float32)
    if len(outputs) != 1 or not numpy.allclose(outputs[0], expected, rtol=0, atol=1e-5):
        worst = abs(numpy.asarray(outputs[0]) - expected).max() if len(outputs) == 1 else "another number of outputs"
        raise RuntimeError(f"a Q/DQ file must give the standard's numbers: got a difference of {worst}")
