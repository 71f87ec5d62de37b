"""Max pools of what a float operator makes, and means over pixels, in files written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fxquant.onnx.pools import means_by_axis, pool_floats
from fxquant.targets.session import levels, session

HEAD = '<ir_version: 10, opset_import: ["" : 21]> net (float[1,4,8,8] x) => (float[?,?,?,?] y)'
HELD = "float s = {0.05}, uint8 z = {100}, float v = {0.01}, int8 o = {0}, float[4,4,1,1] w = {"
HELD += ", ".join(f"{n:.4f}" for n in np.random.default_rng(0).normal(size=16)) + "}"
POOL = "<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>"
PAIR = "c = QuantizeLinear(f, s, z) d = DequantizeLinear(c, s, z)"
AFTER = "g = Conv(e, u) h = QuantizeLinear(g, s, z) y = DequantizeLinear(h, s, z)"
CODES = "k = QuantizeLinear(w, v, o) u = DequantizeLinear(k, v, o)"
MADE = "i = QuantizeLinear(x, s, z) j = DequantizeLinear(i, s, z) b = Conv(j, u) a = QuantizeLinear(b, s, z) "
MADE += "m = DequantizeLinear(a, s, z)"
FLOATS = "b = Sigmoid(x) a = QuantizeLinear(b, s, z) m = DequantizeLinear(a, s, z)"
OTHERS = "p = Sigmoid(x) q = QuantizeLinear(p, s, z) l = DequantizeLinear(q, s, z)"
CASES = {
    "float operator": (f"f = Sigmoid(x) {PAIR} e = MaxPool {POOL} (d)", 1),
    "float convolution": (f"b = Conv(x, w) f = Relu(b) {PAIR} e = MaxPool {POOL} (d)", 1),
    "input": (f"f = Identity(x) {PAIR} e = MaxPool {POOL} (d)", 1),
    "two pools": (f"f = Sigmoid(x) {PAIR} q = MaxPool {POOL} (d) e = MaxPool {POOL} (q)", 2),
    "integer convolution": (
        f"i = QuantizeLinear(x, s, z) j = DequantizeLinear(i, s, z) b = Conv(j, u) f = Relu(b) {PAIR} "
        f"e = MaxPool {POOL} (d)",
        0,
    ),
    "no codes": (f"f = Sigmoid(x) e = MaxPool {POOL} (f)", 0),
    "integer convolution after a pool": (
        f"{MADE} n = MaxPool <kernel_shape = [1, 1]> (m) r = Conv(n, u) f = Relu(r) {PAIR} e = MaxPool {POOL} (d)",
        0,
    ),
    "floats after an integer convolution": (
        f"{MADE} n = Sigmoid(m) f = Mul(m, n) {PAIR} e = MaxPool {POOL} (d)",
        0,
    ),
    "sum of integer convolutions": (f"{MADE} f = Add(m, m) {PAIR} e = MaxPool {POOL} (d)", 0),
    "sum of float operators": (f"{FLOATS} f = Add(m, m) {PAIR} e = MaxPool {POOL} (d)", 1),
    "sum of one of each": (f"{MADE} {OTHERS} f = Add(m, l) {PAIR} e = MaxPool {POOL} (d)", 1),
}


def model(body: str) -> onnx.ModelProto:
    found = onnx.parser.parse_model(f"{HEAD} <{HELD}> {{ {CODES} {body} {AFTER} }}")
    return onnx.shape_inference.infer_shapes(found)


def run(path: Path, level: str | None, optimized: Path | None = None) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    built = session(path, optimize=level is None, level=level, threads=1, optimized_path=optimized)
    return built.run(None, {"x": x})[0]


def at_every_level(
    before: onnx.ModelProto, after: onnx.ModelProto, folder: Path
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Level by level, what two files give."""
    onnx.save(before, folder / "before.onnx")
    onnx.save(after, folder / "after.onnx")
    for level in levels():
        yield level, run(folder / "before.onnx", level), run(folder / "after.onnx", level)


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_the_same_at_every_level(name: str, tmp_path: Path) -> None:
    body, changed = CASES[name]
    before = model(body)
    found = ir.serde.deserialize_model(before)
    assert pool_floats(found.graph) == changed
    after = ir.serde.serialize_model(found)
    onnx.checker.check_model(after, full_check=True)
    for level, expected, got in at_every_level(before, after, tmp_path):
        assert len(np.unique(expected)) > 4
        np.testing.assert_array_equal(got, expected, err_msg=level)


def kinds_of_pools(path: Path) -> set[int]:
    """The element types that MaxPools read, in a graph that onnxruntime has optimized."""
    found = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*found.graph.value_info, *found.graph.input)}
    makers = {name: node for node in found.graph.node for name in node.output}
    seen = set()
    for node in found.graph.node:
        if "MaxPool" in node.op_type:
            maker = makers.get(node.input[0])
            of_codes = maker is not None and maker.op_type in ("QuantizeLinear", "QLinearConv", "NhwcMaxPool")
            seen.add(onnx.TensorProto.UINT8 if of_codes else kinds.get(node.input[0], onnx.TensorProto.FLOAT))
    return seen


@pytest.mark.parametrize("name", ["float operator", "float convolution"])
def test_onnxruntime_pools_floats_then_and_codes_before(name: str, tmp_path: Path) -> None:
    """What it is for, in the optimized graph: without the form, quantizers are moved and the pool is of codes."""
    before = model(CASES[name][0])
    found = ir.serde.deserialize_model(before)
    pool_floats(found.graph)
    onnx.save(before, tmp_path / "before.onnx")
    onnx.save(ir.serde.serialize_model(found), tmp_path / "after.onnx")
    for which, kind in (("before", onnx.TensorProto.UINT8), ("after", onnx.TensorProto.FLOAT)):
        run(tmp_path / f"{which}.onnx", "extended", tmp_path / f"{which}.optimized.onnx")
        assert kinds_of_pools(tmp_path / f"{which}.optimized.onnx") == {kind}


INTEGERS = "i = QuantizeLinear(x, s, z) j = DequantizeLinear(i, s, z) b = Conv(j, u)"
SILU = f"{INTEGERS} f = QuantizeLinear(b, s, z) d = DequantizeLinear(f, s, z) m = Sigmoid(d) e = Mul(d, m)"
MEANS = {
    "after an integer convolution": (SILU, "axes", "keepdims = 1", "y = Neg(r)", 1),
    "without the axes": (SILU, "axes", "keepdims = 0", "q = Neg(r) y = Reshape(q, like)", 1),
    "negative axes": (SILU, "negative", "keepdims = 1", "y = Neg(r)", 1),
    "other axes": (SILU, "others", "keepdims = 1", "y = Neg(r)", 0),
    "after a float convolution": ("b = Conv(x, w) e = Sigmoid(b)", "axes", "keepdims = 1", "y = Neg(r)", 0),
    "between codes": (
        f"{INTEGERS} f = QuantizeLinear(b, s, z) e = DequantizeLinear(f, s, z)",
        "axes",
        "keepdims = 1",
        "g = QuantizeLinear(r, s, z) y = DequantizeLinear(g, s, z)",
        0,
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_the_same_by_one_axis_after_the_other(name: str, tmp_path: Path) -> None:
    body, axes, keep, after, changed = MEANS[name]
    held = f"{HELD}, int64[2] axes = {{2, 3}}, int64[2] negative = {{-1, -2}}, int64[2] others = {{1, 2}}"
    held += ", int64[4] like = {1, 4, 1, 1}"
    text = f"{HEAD} <{held}> {{ {CODES} {body} r = ReduceMean <{keep}> (e, {axes}) {after} }}"
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    found = ir.serde.deserialize_model(before)
    assert means_by_axis(found.graph) == changed
    changed_model = ir.serde.serialize_model(found)
    onnx.checker.check_model(changed_model, full_check=True)
    for level, expected, got in at_every_level(before, changed_model, tmp_path):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=level)


def test_two_means_are_one_again_where_the_convolution_is_float() -> None:
    held = f"{HELD}, int64[1] rows = {{3}}, int64[1] columns = {{2}}"
    means = "t = ReduceMean (e, rows) r = ReduceMean (t, columns) y = Neg(r)"
    for body, count in ((SILU, 2), ("b = Conv(x, w) e = Sigmoid(b)", 1)):
        text = f"{HEAD} <{held}> {{ {CODES} {body} {means} }}"
        found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
        assert means_by_axis(found.graph) == 0
        after = ir.serde.serialize_model(found)
        onnx.checker.check_model(after, full_check=True)
        assert sum(node.op_type == "ReduceMean" for node in after.graph.node) == count
