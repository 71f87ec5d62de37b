#!/usr/bin/env bash
# onnxruntime 1.31.1: the default optimizer makes an int8 Q/DQ file of opset 21 that is valid into one that it refuses.
#
# A tensor is quantized to int8 with a zero point of 0 (QuantizeLinear, DequantizeLinear), transposed, and multiplied
# (MatMul): attention's keys, in files whose quantizers are symmetric, as TensorRT and OpenVINO want them. onnx's checker
# passes the file and onnxruntime runs it without optimizations. With them, the load fails: the pair is moved past the
# Transpose, where it is written with the attribute output_dtype=INT8, and then turned to uint8 with a zero point of 128,
# which leaves that attribute as it was. At opset 19, whose QuantizeLinear has no such attribute, and with uint8, the file
# loads. A pair without a zero point (int8 by its output_dtype) is left alone and loads, with the same numbers.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

ort.set_default_logger_severity(4)


def file(kind: type, opset: int, zero_point: bool = True) -> bytes:
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(kind(0), "zero")]
    last, told = (["zero"], {}) if zero_point else ([], {"output_dtype": T.INT8})
    nodes = []
    for name in ("x", "y"):
        nodes.append(h.make_node("QuantizeLinear", [name, "scale", *last], [f"{name}_codes"], **told))
        nodes.append(h.make_node("DequantizeLinear", [f"{name}_codes", "scale", *last], [f"{name}_values"]))
    nodes.append(h.make_node("Transpose", ["x_values"], ["keys"], perm=[0, 2, 1]))
    nodes.append(h.make_node("MatMul", ["y_values", "keys"], ["product"]))
    shapes = {"x": [1, 4, 4], "y": [1, 3, 4], "product": [1, 3, 4]}
    x, y, product = (h.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in shapes.items())
    graph = h.make_graph(nodes, "attention", [x, y], [product], held)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def load(content: bytes, optimize: bool = True) -> tuple[str, object]:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return f"refused: {str(error).splitlines()[0][:160]}", None
    random = np.random.default_rng(0)
    feeds = {i.name: random.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}
    return "loads", session.run(None, feeds)[0]


print("onnxruntime", ort.__version__)
found = {
    "int8, opset 21, not optimized": load(file(np.int8, 21), optimize=False),
    "int8, opset 21": load(file(np.int8, 21)),
    "int8, opset 19": load(file(np.int8, 19)),
    "uint8, opset 21": load(file(np.uint8, 21)),
    "int8, opset 21, no zero point": load(file(np.int8, 21, zero_point=False)),
}
for name, (said, _) in found.items():
    print(f"{name}: {said}")
refused = [name for name, (said, _) in found.items() if said != "loads"]
mismatch = "output_dtype INT8 does not match y_zero_point type UINT8" in found["int8, opset 21"][0]
plain, without = found["int8, opset 21, not optimized"][1], found["int8, opset 21, no zero point"][1]
print("largest difference:", float(np.abs(plain - without).max()))
same = bool(np.abs(plain - without).max() < 1e-5)
sys.exit(0 if refused == ["int8, opset 21"] and mismatch and same else 1)
PYTHON
