#!/usr/bin/env bash
# OpenCV 5.0.0 DNN: a file loads and fails as it runs, where an Add of codes reads a DequantizeLinear that is read twice.
#
# Add of two dequantized tensors, Relu, QuantizeLinear: OpenCV makes an Add of codes of them. Where something else reads
# one of the two DequantizeLinear (a residual's does: the convolution reads it too), the net fails in forward with
# "bufidx >= 0 in function 'argTensor'". With a DequantizeLinear for each reader it runs and is right, and without the
# Relu it runs in float. onnx's checker passes the file and onnxruntime runs it.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93 onnx==1.23.2 numpy==2.4.6 2>/dev/null
export OPENCV_LOG_LEVEL=OFF
"$work/venv/bin/python" - <<'PYTHON'
import sys

import cv2
import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper


def file(shared: bool, relu: bool) -> bytes:
    held = {"scale": np.float32(0.05), "middle": np.uint8(128), "zero": np.uint8(0)}
    nodes = [
        h.make_node("QuantizeLinear", ["x", "scale", "middle"], ["x_codes"]),
        h.make_node("DequantizeLinear", ["x_codes", "scale", "middle"], ["once"]),
        h.make_node("DequantizeLinear", ["x_codes", "scale", "middle"], ["again"]),
        h.make_node("Sigmoid", ["once"], ["branch"]),
        h.make_node("QuantizeLinear", ["branch", "scale", "zero"], ["branch_codes"]),
        h.make_node("DequantizeLinear", ["branch_codes", "scale", "zero"], ["branch_values"]),
        h.make_node("Add", ["branch_values", "once" if shared else "again"], ["sum"]),
        h.make_node("Relu", ["sum"], ["positive"]),
        h.make_node("QuantizeLinear", ["positive" if relu else "sum", "scale", "zero"], ["y_codes"]),
        h.make_node("DequantizeLinear", ["y_codes", "scale", "zero"], ["y"]),
    ]
    read = {name for node in nodes for name in node.input} | {"y"}
    nodes = [node for node in nodes if node.output[0] in read]
    x, y = (h.make_tensor_value_info(name, T.FLOAT, [1, 32]) for name in ("x", "y"))
    constants = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = h.make_graph(nodes, "residual", [x], [y], constants)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(shared: bool, relu: bool) -> str:
    net = cv2.dnn.readNetFromONNX(np.frombuffer(file(shared, relu), np.uint8))
    net.setInput(x)
    try:
        found = net.forward()
    except cv2.error as error:
        return "fails" if "bufidx >= 0" in str(error) else str(error)
    codes = np.round(x / np.float32(0.05))
    branch = np.round(1 / (1 + np.exp(-codes * 0.05)) / 0.05)
    return f"{int((np.abs(found - np.clip(codes + branch, 0, 255) * 0.05) > 1e-3).sum())} wrong"


x = np.linspace(-2, 2, 32, dtype=np.float32).reshape(1, 32)
found = {(shared, relu): run(shared, relu) for shared in (True, False) for relu in (True, False)}
for (shared, relu), told in found.items():
    print("OpenCV", cv2.__version__, "| DequantizeLinear for", "both" if shared else "each", "| Relu" if relu else "| no Relu", "|", told)
sys.exit(found.pop((True, True)) != "fails" or set(found.values()) != {"0 wrong"})
PYTHON
