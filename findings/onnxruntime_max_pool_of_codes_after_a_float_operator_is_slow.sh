#!/usr/bin/env bash
# onnxruntime 1.31.1 and 1.32.0: a MaxPool between a float operator and a QuantizeLinear runs on codes, many times slower.
#
# The optimizer moves a QuantizeLinear up through a MaxPool (a maximum commutes with rounding), so that the pool has bytes
# to read. Beside an integer convolution that is fast: the pool takes the convolution's layout. After a float operator
# it is a plain loop over bytes, which takes tens of times as long as the pool of floats; so does a pool that was written
# between a DequantizeLinear and a QuantizeLinear. A network whose first convolution stays float loses half of its gain
# there. With a Sum of one operand between the pool and the QuantizeLinear nothing is moved, and the pool is float.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PYTHON'
import statistics
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

ort.set_default_logger_severity(4)


def file(stopped: bool) -> bytes:
    held = [numpy_helper.from_array(np.float32(0.01), "scale"), numpy_helper.from_array(np.uint8(0), "zero")]
    nodes = [h.make_node("Sigmoid", ["x"], ["a"])]
    nodes.append(h.make_node("MaxPool", ["a"], ["b"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]))
    if stopped:
        nodes.append(h.make_node("Sum", ["b"], ["c"]))
    nodes.append(h.make_node("QuantizeLinear", ["c" if stopped else "b", "scale", "zero"], ["d"]))
    nodes.append(h.make_node("DequantizeLinear", ["d", "scale", "zero"], ["y"]))
    x = h.make_tensor_value_info("x", T.FLOAT, [1, 64, 112, 112])
    y = h.make_tensor_value_info("y", T.FLOAT, [1, 64, 56, 56])
    model = h.make_model(h.make_graph(nodes, "pool", [x], [y], held), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


options = ort.SessionOptions()
options.intra_op_num_threads = 1
x = np.random.default_rng(0).standard_normal((1, 64, 112, 112), dtype=np.float32)
sessions = [ort.InferenceSession(file(stopped), options, providers=["CPUExecutionProvider"]) for stopped in (False, True)]
outputs = [session.run(None, {"x": x})[0] for session in sessions]
times: list[list[float]] = [[], []]
for _ in range(15):
    for session, found in zip(sessions, times):
        start = time.process_time()
        session.run(None, {"x": x})
        found.append(time.process_time() - start)
moved, stopped = (1e3 * statistics.median(found) for found in times)
print(f"onnxruntime {ort.__version__}: {moved:.2f} ms, with a Sum before QuantizeLinear {stopped:.2f} ms;",
      "same values" if np.array_equal(*outputs) else "other values")
sys.exit(0 if moved > 2 * stopped and np.array_equal(*outputs) else 1)
PYTHON
held=0
for version in 1.31.1 1.32.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==$version" onnx==1.23.2 numpy 2>/dev/null
    "$work/$version/bin/python" "$work/run.py" || held=1
done
exit $held
