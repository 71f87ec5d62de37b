#!/usr/bin/env bash
# onnxruntime 1.31.1: without VNNI its int8 products saturate, and the setting that makes them exact refuses a valid file
# in which two weights have one zero point.
#
# On an x86 CPU with AVX2 and without VNNI, onnxruntime's kernels add two products of uint8 and int8 in 16 bits. Two
# products of the largest codes do not fit: the result of a quantized MatMul is silently wrong, at every level that makes
# integer kernels of Q/DQ. The session entry session.x64quantprecision = 1 has the int8 weights turned to uint8 when the
# file is loaded, and the sums are right. A file whose two weights read one zero point initializer (exporters join equal
# constants) is then refused at load, though it is valid and loads without the entry; with a copy of the zero point for each
# weight it loads. One weight that two products read is refused in the same way. Weights of 7 bits never saturate.
#
# Exits 0 while that is so, non-zero when it changes; on a CPU with VNNI there is nothing to see, and it says so.
# Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
if ! grep -q -w avx2 /proc/cpuinfo || grep -q -E -w 'avx512_vnni|avx_vnni' /proc/cpuinfo; then
    echo "not to be seen here: it takes an x86 CPU with AVX2 and without VNNI"
    exit 0
fi
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
SIZE = 64


def file(zero_points: tuple[str, str], weights: tuple[str, str] = ("w0", "w1"), largest: int = 127) -> bytes:
    """y = (x · w) · w with codes of 255 and of the largest weight, scales that keep x = 1 and y = 1."""
    held = [numpy_helper.from_array(np.float32(1 / 255), "scale"), numpy_helper.from_array(np.uint8(0), "zero")]
    held += [numpy_helper.from_array(np.full((SIZE, SIZE), largest, np.int8), name) for name in sorted(set(weights))]
    held += [numpy_helper.from_array(np.int8(0), name) for name in sorted(set(zero_points))]
    held.append(numpy_helper.from_array(np.float32(1 / (SIZE * largest)), "step"))
    nodes, last = [], "x"
    for number, (zero, weight) in enumerate(zip(zero_points, weights)):
        nodes.append(h.make_node("QuantizeLinear", [last, "scale", "zero"], [f"codes{number}"]))
        nodes.append(h.make_node("DequantizeLinear", [f"codes{number}", "scale", "zero"], [f"values{number}"]))
        nodes.append(h.make_node("DequantizeLinear", [weight, "step", zero], [f"weight{number}"]))
        last = f"product{number}"
        nodes.append(h.make_node("MatMul", [f"values{number}", f"weight{number}"], [last]))
    x, y = h.make_tensor_value_info("x", T.FLOAT, [2, SIZE]), h.make_tensor_value_info(last, T.FLOAT, [2, SIZE])
    model = h.make_model(h.make_graph(nodes, "two", [x], [y], held), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(content: bytes, *, exact: bool, optimize: bool = True) -> str:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return f"refused ({str(error).rpartition(' : ')[2].strip()[:80]})"
    (y,) = session.run(None, {"x": np.ones((2, SIZE), np.float32)})
    return f"{float(y.max()):.3f}"


own, shared = file(("z0", "z1")), file(("z0", "z0"))
seen = {
    "as the standard says": run(own, exact=False, optimize=False),
    "by default": run(own, exact=False),
    "weights of 7 bits, by default": run(file(("z0", "z1"), largest=63), exact=False),
    "exact, a zero point each": run(own, exact=True),
    "exact, one zero point": run(shared, exact=True),
    "exact, one weight twice": run(file(("z0", "z1"), ("w0", "w0")), exact=True),
    "one zero point, by default": run(shared, exact=False),
}
print("onnxruntime", ort.__version__)
for name, value in seen.items():
    print(f"{name:32} {value}")
right = ("as the standard says", "weights of 7 bits, by default", "exact, a zero point each")
wrong = ("by default", "one zero point, by default")
holds = (
    all(seen[name] == "1.000" for name in right)
    and all(not seen[name].startswith("refused") and float(seen[name]) < 0.6 for name in wrong)
    and all(seen[name].startswith("refused") for name in ("exact, one zero point", "exact, one weight twice"))
)
print("as described" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
