#!/usr/bin/env bash
# OpenVINO 2025.3 to 2026.3: a QuantizeLinear whose int8 is named by output_dtype, without a zero point, gives uint8.
#
# From opset 21 on, ONNX lets QuantizeLinear leave out its zero point and name the type of its codes by the attribute
# output_dtype. OpenVINO loads such a file (2025.2 and older refuse it where there is more than one channel) and does not
# read the attribute: all codes are taken for uint8, so that every negative number becomes 0, in silence. With a zero
# point of int8 0 in its place the numbers are the standard's. 2026.4 reads both alike.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper


def file(zero_point: bool) -> bytes:
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    last, told = (["zero"], {}) if zero_point else ([], {"output_dtype": T.INT8})
    nodes = [
        h.make_node("QuantizeLinear", ["x", "scale", *last], ["codes"], **told),
        h.make_node("DequantizeLinear", ["codes", "scale", *last], ["y"]),
    ]
    x, y = (h.make_tensor_value_info(name, T.FLOAT, [2, 8]) for name in ("x", "y"))
    model = h.make_model(h.make_graph(nodes, "pair", [x], [y], held), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8)
expected = np.round(x / np.float32(0.05)) * np.float32(0.05)
wrong = []
for zero_point in (True, False):
    try:
        found = ov.Core().compile_model(ov.Core().read_model(file(zero_point)), "CPU")(x)[0]
    except RuntimeError:
        wrong.append("refused")
    else:
        wrong.append(str(int((np.abs(found - expected) > 1e-3).sum())))
print("OpenVINO", ov.__version__.partition("-")[0], "| of 16 values, 8 below 0: wrong with a zero point,", wrong[0],
      "| with output_dtype,", wrong[1])
sys.exit(wrong != sys.argv[1:])
PYTHON
held=0
while read -r version with without; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "openvino==$version" onnx==1.23.2 numpy 2>/dev/null
    "$work/$version/bin/python" "$work/run.py" "$with" "$without" || held=1
done <<'VERSIONS'
2025.2.0 0 refused
2025.3.0 0 8
2026.3.0 0 8
2026.4.1 0 0
VERSIONS
exit $held
