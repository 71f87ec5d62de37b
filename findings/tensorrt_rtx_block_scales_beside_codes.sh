#!/usr/bin/env bash
# TensorRT for RTX 1.7.1 (ONNX parser 2.0.0), which parses and builds without a GPU, makes one integer product of a weight
# with scales per block and a quantized activation, though its sums belong to different scales.
#
# A DequantizeLinear with block_size 64 over a weight [128, 8] has two scales a column, and the sum over the 128 rows is
# two sums, each with its own scale. Beside a float activation the weight is dequantized and multiplied in float, as is
# right. Beside an int8 activation the file builds without a warning, and the plan holds one product of int8 by int8 over
# all 128 rows: no factor after it can be right for both blocks.
#
# Exits 0 while that is so, non-zero when it changes. Needs Linux x86_64, Python 3.10 to 3.13 and pip; installs into a
# folder of its own. What an operation reads is in the text that a plan holds: lines "tensor={… name= dims= type= }" and
# "fully_connected={ … input={…} }" (matrix product).
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
        if severity <= trt.ILogger.Severity.WARNING and "Cuda Runtime" not in text:
            self.lines.append(text)


def file(quantized: bool) -> bytes:
    held = {"s": np.float32(0.05), "z": np.int8(0), "codes": np.ones((128, 8), np.int8)}
    held |= {"ws": np.array([[0.5] * 8, [0.125] * 8], np.float32), "wz": np.zeros((2, 8), np.int8)}
    nodes = [h.make_node("DequantizeLinear", ["codes", "ws", "wz"], ["w"], axis=0, block_size=64)]
    if quantized:
        nodes.append(h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]))
        nodes.append(h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]))
    nodes.append(h.make_node("MatMul", ["d" if quantized else "x", "w"], ["y"]))
    values = [h.make_tensor_value_info(name, T.FLOAT, sizes) for name, sizes in (("x", [4, 128]), ("y", [4, 8]))]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    graph = h.make_graph(nodes, "net", values[:1], values[1:], tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def built(content: bytes) -> tuple[list[tuple[str, str]], list[str]]:
    """Sizes and types of what each product reads, and what was said."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(content)
    text = bytes(builder.build_serialized_network(network, builder.create_builder_config())).decode("latin1")
    tensors = re.findall(r'tensor=\{[^\n]*?dims=\{ ([^}]*?) \}[^\n]*?name="([^"]*)"[^\n]*?type=(\w+)', text)
    known = {name: (dims, kind) for dims, name, kind in tensors}
    products = re.findall(r'\n  fully_connected=\{ [^\n]*?\binput=\{([^}]*)\}', text)
    return [known[name] for read in products for name in re.findall(r'"([^"]*)"', read)[:2]], log.lines


print("tensorrt_rtx", trt.__version__)
beside_float, beside_codes = built(file(False)), built(file(True))
print("beside a float activation:", beside_float)
print("beside an int8 activation:", beside_codes)
floats = {kind for _, kind in beside_float[0]}
one_product = [kind for _, kind in beside_codes[0]] == ["int8", "int8"] and "128" in beside_codes[0][0][0]
sys.exit(0 if floats == {"float"} and one_product and not beside_codes[1] else 1)
PYTHON
