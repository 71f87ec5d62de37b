#!/usr/bin/env bash
# OpenVINO 2026.4.1: one ONNX model has two inputs when read by its path, and one when read from bytes.
#
# An input that no node reads, as an unused mask of a language model's file, is a Parameter of the model that
# `Core.read_model(path)` gives, and is missing from `Core.read_model(bytes)`. Who feeds both by name can run the first
# alone: the second raises "Port for tensor name … was not found".
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.10 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 'numpy<2.5' 2>/dev/null
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys

import numpy as np
import onnx
import openvino
from onnx import TensorProto as T
from onnx import helper as h

inputs = [h.make_tensor_value_info(name, T.FLOAT, [2]) for name in ("x", "mask")]
graph = h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", inputs, [h.make_tensor_value_info("y", T.FLOAT, [2])])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
path = f"{sys.argv[1]}/model.onnx"
onnx.save(model, path)
feeds = {"x": np.ones(2, np.float32), "mask": np.ones(2, np.float32)}
found = {}
for way, source in (("path", path), ("bytes", model.SerializeToString())):
    core = openvino.Core()
    read = core.read_model(source)
    names = sorted(name for each in read.inputs for name in each.get_names())
    try:
        core.compile_model(read, "CPU")(feeds)
        ran = "runs"
    except Exception as error:
        ran = next(line.strip() for line in str(error).splitlines() if "Port for tensor name" in line)
    found[way] = (names, ran)
    print(f"OpenVINO {openvino.__version__}, read by {way}: inputs {', '.join(names)}; fed both, {ran}")
same = found["path"] == (["mask", "x"], "runs")
sys.exit(0 if same and found["bytes"][0] == ["x"] and found["bytes"][1] != "runs" else 1)
PYTHON
