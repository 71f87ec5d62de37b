"""Small quantized ONNX graphs, written node by node, for the tests of what onnxruntime does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT, FLOAT16, INT64, BOOL = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "INT64", "BOOL"))


class Graph:
    """Collects nodes; every method returns the name of the value it makes.

    Nodes and values are called ``relu_3``, after the op and a running number, unless ``name`` says otherwise.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def input(self, *shape: int | str, dtype: int = FLOAT, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value: Any, name: str | None = None) -> str:
        name = name or self.fresh("const")
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = name or self.fresh(op_type.lower())
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def qdq(
        self,
        x: str,
        scale: Any = 0.05,
        zero_point: Any = 128,
        dtype: Any = np.uint8,
        *,
        name: str | None = None,
        **attributes: Any,
    ) -> str:
        scale = scale if isinstance(scale, np.ndarray | np.generic) else np.float32(scale)
        scale_name = self.const(scale)
        zero = self.const(np.full(scale.shape, zero_point, dtype))
        codes = self.op("QuantizeLinear", x, scale_name, zero, name=name, **attributes)
        return self.op("DequantizeLinear", codes, scale_name, zero, **attributes)

    def weight(self, *shape: int, axis: int, dtype: Any = np.int8, limit: int = 127, scale: float | None = None) -> str:
        """Symmetric codes per output channel after a DequantizeLinear; scales at random unless given."""
        codes = self.const(self.rng.integers(-limit, limit + 1, shape).astype(dtype))
        scales = np.full(shape[axis], scale or 0.0)
        if scale is None:
            scales = self.rng.uniform(0.005, 0.015, shape[axis])
        scale_name = self.const(scales.astype(np.float32))
        return self.op("DequantizeLinear", codes, scale_name, self.const(np.zeros(shape[axis], dtype)), axis=axis)

    def floats(self, *shape: int, name: str | None = None) -> str:
        return self.const(self.rng.standard_normal(shape).astype(np.float32), name)

    def conv(self, x: str, channels: int = 4, *, name: str = "conv", bias: bool = True, **attributes: Any) -> str:
        inputs = [x, self.weight(channels, 4, 3, 3, axis=0), *([self.floats(channels)] if bias else [])]
        return self.op("Conv", *inputs, name=name, pads=[1] * 4, **attributes)

    def model(self, *outputs: str, opset: int = 21) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, [], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
        model.graph.output.extend(types[name] for name in outputs)
        onnx.checker.check_model(model, full_check=True)
        return model

    def write(self, path: Path, output: str, *, opset: int, checked: bool) -> Path:
        """A file that may hold TensorRT's operators, and unless it is ``checked`` what onnx refuses."""
        domains = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, [], self.constants)
        model = helper.make_model(graph, opset_imports=domains, ir_version=11)
        types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
        model.graph.output.append(types.get(output) or helper.make_tensor_value_info(output, FLOAT, None))
        if checked:
            onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path

    def save(self, folder: Path, *outputs: str, opset: int = 21) -> Path:
        path = folder / "model.onnx"
        onnx.save(self.model(*outputs, opset=opset), path)
        return path


def image(*, scale: float = 0.05, zero_point: int = 128, dtype: Any = np.uint8) -> tuple[Graph, str]:
    """A graph with a quantized input ``x`` of shape [batch, 4, 6, 6]."""
    graph = Graph()
    return graph, graph.qdq(graph.input("batch", 4, 6, 6), scale, zero_point, dtype)


def rows(*, rank: int = 2) -> tuple[Graph, str]:
    """A graph with a quantized input ``x`` of shape [batch, 8] or [batch, 3, 8]."""
    graph = Graph()
    return graph, graph.qdq(graph.input("batch", *([3] * (rank - 2)), 8))
