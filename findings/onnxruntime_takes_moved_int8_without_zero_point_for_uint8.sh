#!/usr/bin/env bash
# onnxruntime up to 1.26, and 1.32 at opset 20: int8 codes whose DequantizeLinear has no zero point become uint8, in silence.
#
# A tensor is quantized to int8 with a zero point of 0, which DequantizeLinear leaves out (it is 0 by default), and is then
# transposed: attention's keys, in files for OpenVINO and TensorRT. onnx's checker passes the file and onnxruntime runs
# it right without optimizations. From the basic level on it moves DequantizeLinear past the Transpose and puts a new pair
# there, whose QuantizeLinear has no zero point either and therefore gives uint8: all negative numbers become 0. From 1.27
# on the new one has output_dtype, at opset 21 and higher; older opsets have no such attribute and stay wrong. With the
# zero point in DequantizeLinear too, 1.27 and later refuse the file at opset 21 (onnxruntime_int8_pair_before_transpose.sh),
# and all are right at opset 20.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

ort.set_default_logger_severity(4)


def file(opset: int) -> bytes:
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    nodes = [
        h.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        h.make_node("DequantizeLinear", ["codes", "scale"], ["values"]),
        h.make_node("Transpose", ["values"], ["y"], perm=[1, 0]),
    ]
    x, y = (h.make_tensor_value_info(name, T.FLOAT, [4, 4]) for name in ("x", "y"))
    graph = h.make_graph(nodes, "keys", [x], [y], held)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def wrong(opset: int, level: str) -> int:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(file(opset), options, providers=["CPUExecutionProvider"])
    return int((np.abs(session.run(None, {"x": x})[0] - expected) > 1e-3).sum())


x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(4, 4)
expected = (np.round(x / np.float32(0.05)) * np.float32(0.05)).T
found = [wrong(opset, level) for opset in (20, 21) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC")]
print("onnxruntime", ort.__version__, "| of 16 values, 8 below 0: wrong at opset 20 without and with optimizations",
      *found[:2], "| at opset 21", *found[2:])
sys.exit(found != list(map(int, sys.argv[1:])))
PYTHON
held=0
while read -r version counts; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==$version" onnx==1.23.2 numpy 2>/dev/null
    # shellcheck disable=SC2086
    "$work/$version/bin/python" "$work/run.py" $counts || held=1
done <<'VERSIONS'
1.20.0 0 8 0 8
1.26.0 0 8 0 8
1.27.0 0 8 0 0
1.32.0 0 8 0 0
VERSIONS
exit $held
