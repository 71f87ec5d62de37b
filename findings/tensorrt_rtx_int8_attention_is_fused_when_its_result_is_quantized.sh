#!/usr/bin/env bash
# TensorRT for RTX 1.7.1 (ONNX parser 2.0.0), which parses and builds without a GPU, makes one int8 kernel of attention only
# where the result of its second product is quantized too.
#
# softmax(q · kᵀ) · v with Q/DQ (int8, scalar scales) on query, key, probabilities and value becomes two int8 products with a
# softmax between them, in float32 and in float16. With a fifth pair after the second product, as it stands where a
# quantized linear layer follows, the plan holds one operation "_gemm_mha_v2" that reads int8, in both types; a file in
# float32 without Q/DQ has no such kernel, one in float16 has. Pairs on query and key alone leave the second product float,
# and break the kernel that float16 has without any.
#
# Exits 0 while that is so, non-zero when it changes. Needs Linux x86_64, Python 3.10 to 3.13 and pip; installs into a
# folder of its own. What a plan runs is in its text: "_gemm_mha_v2" (fused attention), "fully_connected" (matrix product).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx==1.7.1.116 onnx==1.23.2 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import re
import sys

import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper


def file(quantized: str, half: bool) -> bytes:
    """``quantized``: which of q, k, v, p (probabilities) and r (result) have a pair."""
    kind, nodes, told = (T.FLOAT16 if half else T.FLOAT), [], {}
    told = {"output_dtype": T.FLOAT16} if half else {}
    held = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.int8(0), "zero")]

    def place(name: str, value: str) -> str:
        if name not in quantized:
            return value
        nodes.append(h.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{name}_codes"]))
        nodes.append(h.make_node("DequantizeLinear", [f"{name}_codes", "scale", "zero"], [f"{name}_values"], **told))
        return f"{name}_values"

    q, k, v = (place(name, name) for name in "qkv")
    nodes.append(h.make_node("Transpose", [k], ["kt"], perm=[0, 1, 3, 2]))
    nodes.append(h.make_node("MatMul", [q, "kt"], ["scores"]))
    nodes.append(h.make_node("Softmax", ["scores"], ["probabilities"]))
    nodes.append(h.make_node("MatMul", [place("p", "probabilities"), v], ["result"]))
    nodes.append(h.make_node("Identity", [place("r", "result")], ["y"]))
    values = {name: h.make_tensor_value_info(name, kind, [2, 4, 128, 64]) for name in "qkvy"}
    graph = h.make_graph(nodes, "attention", [values[name] for name in "qkv"], [values["y"]], held)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def built(content: bytes) -> list[str]:
    """Products of the plan, with the types that they read."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(content)
    text = bytes(builder.build_serialized_network(network, builder.create_builder_config())).decode("latin1")
    types = dict(re.findall(r'tensor=\{[^\n]*?name="([^"]*)"[^\n]*?type=(\w+)', text))
    found = []
    for kind, fields in re.findall(r"\n  (\w+)=\{ ([^\n]*)", text):
        name = re.search(r"name=\"?([\w.]+)", fields)
        fused = kind == "_gemm_mha_v2" or (kind == "function" and name and name[1] == "_gemm_mha_v2")
        if fused or kind == "fully_connected":
            read = re.search(r"\binput(?:_args)?=\{([^}]*)\}", fields)[1]
            kinds = [types.get(each, "?") for each in re.findall(r'"([^"]*)"', read)]
            kinds = [each for each in kinds if each in ("int8", "half", "float")]
            found.append(f"{'fused attention' if fused else 'product'} of {'·'.join(kinds[: 3 if fused else 2])}")
    return found


print("tensorrt_rtx", trt.__version__)
found = {(quantized, half): built(file(quantized, half)) for half in (False, True) for quantized in ("", "qk", "qkvp", "qkvpr")}
for (quantized, half), products in found.items():
    print(f"{'float16' if half else 'float32'}, pairs on {', '.join(quantized) or 'nothing'}: {'; '.join(products)}")
expected = {
    ("", False): ["product of float·float"] * 2,
    ("qk", False): ["product of int8·int8", "product of float·float"],
    ("qkvp", False): ["product of int8·int8"] * 2,
    ("qkvpr", False): ["fused attention of int8·int8·int8"],
    ("", True): ["fused attention of half·half·half"],
    ("qk", True): ["product of int8·int8", "product of half·half"],
    ("qkvp", True): ["product of int8·int8"] * 2,
    ("qkvpr", True): ["fused attention of int8·int8·int8"],
}
sys.exit(0 if found == expected else 1)
PYTHON
