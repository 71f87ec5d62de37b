#!/usr/bin/env bash
# onnxruntime 1.31.1: a Clip between a Conv and its QuantizeLinear keeps the Conv float; the same Clip on the codes does not.
#
# ONNX has no 4-bit codes that onnxruntime's integer kernels write, so 4-bit activations are bytes of which 16 values are
# used. Clipped before they are quantized, as quantizers of training are written, Conv → Clip(−0.8, 0.7) → QuantizeLinear
# stays a float FusedConv at every optimization level, though all its operands are codes: the Clip narrows more than the
# type does, and is not moved over. Written as Conv → QuantizeLinear → Clip(0, 15) on uint8, which gives the same codes, it
# is a QLinearConv and a Clip of bytes. A MatMul without a bias behaves alike (MatMul, QLinearMatMul).
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 2>/dev/null
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

ort.set_default_logger_severity(4)
STEP, POINT = np.float32(0.1), np.uint8(8)
rng = np.random.default_rng(0)
WEIGHTS = {
    "Conv": rng.integers(-7, 8, (8, 4, 3, 3)).astype(np.int8),
    "MatMul": rng.integers(-7, 8, (6, 6)).astype(np.int8),
}
X = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)


def file(op: str, clip: str) -> bytes:
    """x in 4-bit codes · w, whose result is quantized to 4-bit codes: clipped as floats or as codes."""
    held = {
        "s": STEP, "z": POINT, "w": WEIGHTS[op], "ws": np.float32(0.02), "wz": np.int8(0),
        "low": np.float32(-8 * STEP), "high": np.float32(7 * STEP), "first": np.uint8(0), "last": np.uint8(15),
    }
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["wide"]),
        h.make_node("Clip", ["wide", "first", "last"], ["codes"]),
        h.make_node("DequantizeLinear", ["codes", "s", "z"], ["values"]),
        h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"]),
        h.make_node(op, ["values", "weight"], ["sum"]),
    ]
    if clip == "floats":
        nodes.append(h.make_node("Clip", ["sum", "low", "high"], ["narrow"]))
        nodes.append(h.make_node("QuantizeLinear", ["narrow", "s", "z"], ["y"]))
    else:
        nodes.append(h.make_node("QuantizeLinear", ["sum", "s", "z"], ["broad"]))
        nodes.append(h.make_node("Clip", ["broad", "first", "last"], ["y"]))
    x = h.make_tensor_value_info("x", T.FLOAT, X.shape)
    y = h.make_tensor_value_info("y", T.UINT8, ["a", "b", "c", "d"])
    graph = h.make_graph(nodes, "narrow", [x], [y], [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(content: bytes) -> tuple[str, np.ndarray]:
    """The kernel that the product became with all optimizations, and the codes without any."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    ort.InferenceSession(content, options)
    ops = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (codes,) = ort.InferenceSession(content, plain).run(None, {"x": X})
    return next(op for op in ops if "Conv" in op or "MatMul" in op), codes


seen = {}
for op in WEIGHTS:
    found = {clip: run(file(op, clip)) for clip in ("floats", "codes")}
    same = bool((found["floats"][1] == found["codes"][1]).all())
    seen[op] = (found["floats"][0], found["codes"][0], same)
    print(f"{op}: clipped as floats {found['floats'][0]}, clipped as codes {found['codes'][0]}; same codes: {same}")
print("onnxruntime", ort.__version__)
sys.exit(seen != {"Conv": ("FusedConv", "QLinearConv", True), "MatMul": ("MatMul", "QLinearMatMul", True)})
PYTHON
