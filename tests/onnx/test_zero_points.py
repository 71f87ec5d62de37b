"""Int8 pairs that onnxruntime's optimizer moves, in files written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from fxquant.onnx.zero_points import imply_zero_points, imply_zeros_of_tables, own_zero_points

HEAD = '<ir_version: 10, opset_import: ["" : 21]> net (float[1,2,4,8] x, float[1,2,4,8] w) => (float[?,?,?,?] y)'
CONSTANTS = "float s = {0.05}, float t = {0.04}, int8 z = {0}"
LEFT = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)"
PAIR = "c = QuantizeLinear(k, t, z) d = DequantizeLinear(c, t, z)"
TURNED = "e = Transpose <perm = [0, 1, 3, 2]> (d) y = MatMul(b, e)"
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def run(model: onnx.ModelProto, level: str, **more: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    built = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, w = np.random.default_rng(0).normal(size=(2, 1, 2, 4, 8)).astype(np.float32)
    return built.run(None, {"x": x, "w": w, **more})[0]


@pytest.mark.parametrize(
    ("maker", "added"),
    [
        ("k = Neg(w)", 0),
        ("k = Concat <axis = 2> (w, w)", 1),
        ("k = AveragePool <kernel_shape = [2, 2]> (w)", 1),
    ],
    ids=["alone", "concat", "pool"],
)
def test_keys_load_at_every_level(maker: str, added: int) -> None:
    """Of what a kernel with a zero point makes, the Transpose is quantized again; of others, none is written."""
    turned = TURNED.replace("MatMul(b, e)", "MatMul(b2, e)")
    body = f"{LEFT} b2 = Slice(b, i, j, n) {maker} {PAIR} {turned}"
    size = 7 if "Pool" in maker else 8
    held = f"{CONSTANTS}, int64[1] i = {{0}}, int64[1] j = {{{size}}}, int64[1] n = {{3}}"
    model = onnx.parser.parse_model(f"{HEAD} <{held}> {{ {body} }}")
    found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))
    assert imply_zero_points(found.graph) >= 1 and imply_zero_points(found.graph) == 0
    after = ir.serde.serialize_model(found)
    onnx.checker.check_model(after, full_check=True)
    quantizers = [node for node in after.graph.node if node.op_type == "QuantizeLinear"]
    assert [node.input[2] for node in quantizers] == ["z"] * (2 + added)  # the type, to all versions of OpenVINO
    assert any(node.op_type == "DequantizeLinear" and len(node.input) == 2 for node in after.graph.node)
    expected = run(model, LEVELS[0])
    for level in LEVELS:
        np.testing.assert_allclose(run(after, level), expected, atol=1e-5)


def test_a_table_that_is_transposed_loads_at_every_level() -> None:
    """T5's relative positions: looked up in codes, turned, and added to what attention has."""
    table = ", ".join(str(number % 200 - 100) for number in range(64))
    held = f"{CONSTANTS}, int8[8,8] codes = {{{table}}}"
    body = f"""{LEFT} g = Gather(codes, i) d = DequantizeLinear(g, t, z) e = Transpose <perm = [1, 0]> (d)
        f = Slice(e, l, h) y = Add(b, f)"""
    bounds = ", int64[1] l = {0}, int64[1] h = {4}"
    head = HEAD.replace("float[1,2,4,8] w", "float[1,2,4,8] w, int64[8] i")
    model = onnx.parser.parse_model(f"{head} <{held}{bounds}> {{ {body} }}")
    found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))
    assert imply_zeros_of_tables(found.graph) == 1 and imply_zeros_of_tables(found.graph) == 0
    after = ir.serde.serialize_model(found)
    onnx.checker.check_model(after, full_check=True)
    assert [len(n.input) for n in after.graph.node if n.op_type == "DequantizeLinear"] == [3, 2], "the table's alone"
    rows = np.array([3, 1, 7, 0, 2, 2, 5, 4])
    expected = run(model, LEVELS[0], i=rows)
    for level in LEVELS:
        np.testing.assert_allclose(run(after, level, i=rows), expected, atol=1e-5)
    with pytest.raises(Exception, match="output_dtype INT8 does not match"):  # why the pass is there
        run(model, LEVELS[3], i=rows)


def test_weights_have_zero_points_of_their_own() -> None:
    """Each a copy with the same numbers, those of activations as they were."""
    threes, fives = (", ".join([digit] * 64) for digit in "35")
    held = f"int8[8,8] v = {{{threes}}}, int8[8,8] u = {{{fives}}}, float s = {{0.05}}, int8 z = {{0}}"
    body = (
        "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) e = DequantizeLinear(v, s, z) c = MatMul(b, e) "
        "f = DequantizeLinear(u, s, z) y = MatMul(c, f)"
    )
    header = '<ir_version: 10, opset_import: ["" : 21]> net (float[2,8] x) => (float[2,8] y)'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{header} <{held}> {{ {body} }}"))
    assert own_zero_points(model.graph) == 1 and own_zero_points(model.graph) == 0
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    read = {node.output[0]: node.input[2] for node in after.graph.node if len(node.input) > 2}
    assert read == {"a": "z", "b": "z", "e": "z", "f": "z__1"}
    (copy,) = (onnx.numpy_helper.to_array(held) for held in after.graph.initializer if held.name == "z__1")
    assert copy.dtype == np.int8 and copy == 0


def test_codes_that_are_cut_out_of_an_activation_s_keep_theirs() -> None:
    """Kernels that read them as integers want it."""
    held = f"{CONSTANTS}, int64[1] i = {{0}}, int64[1] j = {{2}}, int64[1] n = {{3}}"
    body = "a = QuantizeLinear(x, s, z) b = Slice(a, i, j, n) d = DequantizeLinear(b, s, z) y = MatMul(d, w)"
    model = onnx.parser.parse_model(f"{HEAD} <{held}> {{ {body} }}")
    found = ir.serde.deserialize_model(model)
    assert imply_zeros_of_tables(found.graph) == 0
