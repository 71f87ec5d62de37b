#!/usr/bin/env bash
# TensorRT for RTX 1.7.1 (ONNX parser 2.0.0), which parses and builds without a GPU, takes two valid Q/DQ files as other
# things than they say.
#
# A QuantizeLinear of uint8 with a zero point of 0, as is usual after a ReLU, parses: a warning says that the type
# defaults to INT8, and the network holds an int8 quantizer. Codes above 127 are lost, so half of the range is.
# An activation's scale of shape [1] instead of a scalar is the same in ONNX, and for a MatMul here too; beside a Conv
# the file builds, and the plan has the convolution in float where the same file with a scalar has it in int8.
#
# Exits 0 while that is so, non-zero when it changes. Needs Linux x86_64, Python 3.10 to 3.13 and pip; installs into a
# folder of its own. What an operation reads is in the text that a plan holds: lines "tensor={… name= type= }" and
# "corrltn={ … input={…} }" (convolution), "fully_connected={…}" (matrix product).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx==1.7.1.116 onnx==1.23.2 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import re
import sys

import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, text: str) -> None:
        if severity <= trt.ILogger.Severity.WARNING:
            self.lines.append(text)


def file(op: str, kind: type, shape: tuple[int, ...]) -> bytes:
    x, w = ([1, 4, 8, 8], (4, 4, 3, 3)) if op == "Conv" else ([8, 16], (16, 8))
    held = {"s": np.full(shape, 0.05, np.float32), "z": np.zeros(shape, kind)}
    held |= {"codes": np.ones(w, np.int8), "ws": np.float32(0.01), "wz": np.int8(0)}
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        h.make_node("DequantizeLinear", ["codes", "ws", "wz"], ["w"]),
        h.make_node(op, ["d", "w"], ["y"]),
    ]
    y = [1, 4, 6, 6] if op == "Conv" else [8, 8]
    values = [h.make_tensor_value_info(name, T.FLOAT, sizes) for name, sizes in (("x", x), ("y", y))]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = h.make_graph(nodes, "net", values[:1], values[1:], tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def built(content: bytes) -> tuple[list[str], str, list[str]]:
    """What the product reads, the type that its quantizer writes, and the parser's warnings."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(content)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    written = [str(layer.get_output(0).dtype) for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    text = bytes(builder.build_serialized_network(network, config)).decode("latin1")
    types = dict(re.findall(r'tensor=\{[^\n]*?name="([^"]*)"[^\n]*?type=(\w+)', text))
    (read,) = re.findall(r'\n  (?:corrltn|fully_connected)=\{ [^\n]*?\binput=\{([^}]*)\}', text)
    return [types[name] for name in re.findall(r'"([^"]*)"', read)[:2]], written[0], log.lines


print("tensorrt_rtx", trt.__version__)
cases = {
    "int8, MatMul": ("MatMul", np.int8, ()),
    "uint8, MatMul": ("MatMul", np.uint8, ()),
    "scale [1], MatMul": ("MatMul", np.int8, (1,)),
    "scalar scale, Conv": ("Conv", np.int8, ()),
    "scale [1], Conv": ("Conv", np.int8, (1,)),
}
found = {name: built(file(*case)) for name, case in cases.items()}
for name, (reads, writes, said) in found.items():
    warned = [line for line in said if "INT8" in line]
    print(f"{name}: the product reads {', '.join(reads)}; its quantizer writes {writes}; {warned[:1] or 'no warning'}")
int8 = ["int8", "int8"]
lost = found["uint8, MatMul"]
expected = {name: ["float", "float"] if name == "scale [1], Conv" else int8 for name in cases}
same = {name: reads for name, (reads, _, _) in found.items()} == expected
sys.exit(0 if same and lost[1] == "DataType.INT8" and any("INT8" in line for line in lost[2]) else 1)
PYTHON
