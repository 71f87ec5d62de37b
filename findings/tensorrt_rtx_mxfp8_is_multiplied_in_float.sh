#!/usr/bin/env bash
# TensorRT for RTX 1.7.1 (ONNX parser 2.0.0), which parses and builds without a GPU, multiplies operands in NVFP4 as fp4 and
# operands in MXFP8 as floats, though it reads both through its own quantizers.
#
# Both operands of a product in blocks of 16 of fp4 with fp8 scales (TRT_FP4DynamicQuantize and DequantizeLinear): the plan's
# product reads fp4 by fp4. Both in blocks of 32 of fp8 with powers of two (TRT_MXFP8DynamicQuantize,
# TRT_MXFP8DequantizeLinear): it builds without a word, for compute capability 12.0 as well, and the product reads float32 by
# float32. The codes are made and dequantized again, which costs and gains nothing.
#
# Exits 0 while that is so, non-zero when it changes. Needs Linux x86_64, Python 3.10 to 3.13 and pip; installs into a
# folder of its own. What an operation reads is in the text that a plan holds: lines "tensor={… name= dims= type= }" and
# "fully_connected={ … input={…} }" (matrix product).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx==1.7.1.116 onnx==1.23.2 ml_dtypes 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import re
import sys

import ml_dtypes
import numpy as np
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


def nvfp4() -> tuple[list, dict]:
    held = {"unit": np.float32(0.01), "codes": np.ones((128, 64), ml_dtypes.float4_e2m1fn)}
    held |= {"scales": np.ones((8, 64), ml_dtypes.float8_e4m3fn)}
    along = {"axis": -1, "block_size": 16}
    return [
        h.make_node("TRT_FP4DynamicQuantize", ["x", "unit"], ["q", "qs"], domain="trt", scale_type=17, **along),
        h.make_node("DequantizeLinear", ["qs", "unit"], ["steps"]),
        h.make_node("DequantizeLinear", ["q", "steps"], ["d"], **along),
        h.make_node("DequantizeLinear", ["scales", "unit"], ["ws"]),
        h.make_node("DequantizeLinear", ["codes", "ws"], ["w"], axis=0, block_size=16),
        h.make_node("MatMul", ["d", "w"], ["y"]),
    ], held


def mxfp8() -> tuple[list, dict]:
    held = {"codes": np.ones((64, 128), ml_dtypes.float8_e4m3fn), "exponents": np.full((64, 4), 120, np.uint8)}
    along = {"axis": -1, "block_size": 32, "domain": "trt"}
    return [
        h.make_node("TRT_MXFP8DynamicQuantize", ["x"], ["q", "qs"], output_dtype=17, **along),
        h.make_node("TRT_MXFP8DequantizeLinear", ["q", "qs"], ["d"], output_dtype=1, **along),
        h.make_node("TRT_MXFP8DequantizeLinear", ["codes", "exponents"], ["turned"], output_dtype=1, **along),
        h.make_node("Transpose", ["turned"], ["w"], perm=[1, 0]),
        h.make_node("MatMul", ["d", "w"], ["y"]),
    ], held


def product(nodes: list, held: dict) -> tuple[list[str], list[str]]:
    """The types that the product reads, and what was said."""
    values = [h.make_tensor_value_info(name, T.FLOAT, sizes) for name, sizes in (("x", [4, 128]), ("y", [4, 64]))]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    graph = h.make_graph(nodes, "net", values[:1], values[1:], tensors)
    opsets = [h.make_opsetid("", 23), h.make_opsetid("trt", 1)]
    log = Log()
    builder = trt.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    assert trt.OnnxParser(network, log).parse(h.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
    text = bytes(builder.build_serialized_network(network, config)).decode("latin1")
    known = dict(re.findall(r'tensor=\{[^\n]*?name="([^"]*)"[^\n]*?type=(\w+)', text))
    read = re.findall(r'\n  fully_connected=\{ [^\n]*?\binput=\{([^}]*)\}', text)
    return [known[name] for each in read for name in re.findall(r'"([^"]*)"', each)[:2]], log.lines


print("tensorrt_rtx", trt.__version__)
fp4, mx = product(*nvfp4()), product(*mxfp8())
print("NVFP4 operands:", fp4)
print("MXFP8 operands:", mx)
sys.exit(0 if fp4[0] == ["fp4_e2m1"] * 2 and mx == (["float"] * 2, []) else 1)
PYTHON
