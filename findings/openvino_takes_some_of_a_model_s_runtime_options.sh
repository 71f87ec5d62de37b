#!/usr/bin/env bash
# OpenVINO 2026.4.1 on a CPU: of the options that a model carries, it takes two and passes over the precision in silence.
#
# A model can hold properties for its compilation, in rt_info under "runtime_options", which are saved with the IR. The
# CPU plugin takes KV_CACHE_PRECISION and DYNAMIC_QUANTIZATION_GROUP_SIZE from there. INFERENCE_PRECISION_HINT and
# EXECUTION_MODE_HINT, which say whether a float32 model is computed in bfloat16 on a CPU that has it, have no effect
# there, nor has PERFORMANCE_HINT: nothing is said, and the defaults hold. The same properties given to compile_model are
# taken. So an exporter cannot make a file run in the precision that it was checked in; the program that loads it has to
# ask. What an ONNX file has in metadata_props arrives under "framework", where nobody looks.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.11 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6 2>/dev/null
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

core = ov.Core()
print("openvino", ov.__version__)


def model() -> ov.Model:
    x = ops.parameter([1, 4], np.float32, name="x")
    return ov.Model([ops.matmul(x, ops.constant(np.eye(4, dtype=np.float32)), False, False)], [x], "model")


def properties(key: str, value: str) -> tuple[str, str, str]:
    """As it is by default, carried by a model (through a saved IR), and asked for at the compilation."""
    carrying = model()
    carrying.set_rt_info(value, ["runtime_options", key])
    ov.save_model(carrying, "model.xml", compress_to_fp16=False)
    compiled = (
        core.compile_model(model(), "CPU"),
        core.compile_model(core.read_model("model.xml"), "CPU"),
        core.compile_model(model(), "CPU", {key: value}),
    )
    return tuple(str(each.get_property(key)) for each in compiled)


taken = {"KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
passed_over = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "THROUGHPUT"}
as_found = True
for key, value in {**taken, **passed_over}.items():
    default, carried, asked = properties(key, value)
    print(f"{key}={value}: by default {default}, carried by the model {carried}, asked for {asked}")
    as_found &= default != asked and carried == (asked if key in taken else default)
# On a CPU with bfloat16 the default is bfloat16; on others all three are float32.
default, carried, asked = properties("INFERENCE_PRECISION_HINT", "f32")
print(f"INFERENCE_PRECISION_HINT=f32: by default {default}, carried by the model {carried}, asked for {asked}")
as_found &= carried == default
print("as found" if as_found else "it has changed")
sys.exit(not as_found)
PYTHON
