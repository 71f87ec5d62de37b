"""Forms that a runtime runs faster: files written by hand, held to what they computed, in onnxruntime unoptimized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fxquant.onnx.clip_codes import clip_codes
from fxquant.onnx.runtime_forms import fold_pads, one_node_silu, prelu_of_halves, sum_before_norms
from fxquant.targets.session import run_session, session

HEAD = '<ir_version: 10, opset_import: ["" : 21]> net (float[1,2,4,6] x) => (float[?,?,?,?] y)'
WEIGHT = "float[3,2,3,3] w = {" + ", ".join(str((7 * i) % 11 - 5) for i in range(54)) + "}"
CONSTANTS = f"{WEIGHT}, float s = {{0.1}}, float s2 = {{0.1}}, uint8 z = {{7}}, float zero = {{0}}, float one = {{1}}"
UNEVEN, CHANNELS, LESS = "{0,0,0,1,0,0,1,2}", "{0,0,0,1,0,1,1,2}", "{0,0,0,1,0,0,1,-1}"
QUANTIZE = "c = QuantizeLinear(x, s, z) q = DequantizeLinear(c, s, z)"
AGAIN = "c2 = QuantizeLinear(p, s2, z) r = DequantizeLinear(c2, s2, z)"
X = np.random.default_rng(0).normal(size=(1, 2, 4, 6)).astype(np.float32)


def written(body: str, pads: str = UNEVEN) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} <{CONSTANTS}, int64[8] n = {pads}> {{ {body} }}")
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    return run_session(session(model.SerializeToString(), optimize=False, threads=1), None, {"x": X})[0]


def changed(model: onnx.ModelProto, form: Callable[[Any], int], count: int, whole: bool = False) -> list[str]:
    """The file's operators after a form that finds ``count`` places, and the same numbers; the second time, none."""
    found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))
    given = found if whole else found.graph
    assert form(given) == count and form(given) == 0
    after = ir.serde.serialize_model(found)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_array_equal(run(after), run(model))
    return [node.op_type for node in after.graph.node]


def test_a_pad_between_quantizers_is_the_convolutions() -> None:
    model = written(f"{QUANTIZE} p = Pad(q, n, zero) {AGAIN} y = Conv <pads = [1, 0, 0, 0]> (r, w)")
    assert changed(model, fold_pads, 1) == ["QuantizeLinear", "DequantizeLinear", "Conv"]


def test_a_pad_of_anything_before_a_convolution_is_too() -> None:
    assert changed(written("a = Neg(x) p = Pad(a, n) y = Conv(p, w)"), fold_pads, 1) == ["Neg", "Conv"]


def test_what_moves_values_between_the_quantizers() -> None:
    model = written(f"{QUANTIZE} m = MaxPool <kernel_shape = [2, 2]> (q) p = Pad(m, n, zero) {AGAIN} y = Conv(r, w)")
    assert changed(model, fold_pads, 1) == ["QuantizeLinear", "DequantizeLinear", "MaxPool", "Conv"]


def test_a_pad_that_others_read_stays_for_them() -> None:
    body = f"{QUANTIZE} p = Pad(q, n, zero) {AGAIN} a = Conv(r, w) b = ReduceMax <keepdims = 1> (p) y = Add(a, b)"
    assert changed(written(body), fold_pads, 1).count("Pad") == 1


@pytest.mark.parametrize(
    ("body", "pads"),
    [
        ("p = Pad(x, n, one) y = Conv(p, w)", UNEVEN),
        ('p = Pad <mode = "edge"> (x, n) y = Conv(p, w)', UNEVEN),
        ("p = Pad(x, n, zero) y = Conv(p, three)", CHANNELS),
        ("p = Pad(x, n, zero) y = Conv(p, w)", LESS),
        ('p = Pad(x, n, zero) y = Conv <auto_pad = "SAME_UPPER"> (p, w)', UNEVEN),
        (f"p = Pad(x, n, zero) {AGAIN} y = Conv(r, w)", UNEVEN),
        (f"{QUANTIZE} p = Pad(q, n, zero) {AGAIN.replace('s2', 'one')} y = Conv(r, w)", UNEVEN),
        (f"{QUANTIZE} a = Neg(q) p = Pad(a, n, zero) {AGAIN} y = Conv(r, w)", UNEVEN),
    ],
    ids=["of ones", "of edges", "of channels", "negative", "automatic", "of floats", "other scale", "computed between"],
)
def test_pads_that_stay(body: str, pads: str) -> None:
    model = onnx.parser.parse_model(
        f"{HEAD} <{CONSTANTS}, int64[8] n = {pads}, float[1,3,1,1] three = {{1, 2, 3}}> {{ {body} }}"
    )
    assert "Pad" in changed(model, fold_pads, 0)


def test_sums_before_a_norm() -> None:
    body = "a = Neg(x) b = Add(x, a) d = Add(b, x) c = LayerNormalization(d, k) y = Add(c, b)"
    model = onnx.parser.parse_model(f"{HEAD} <float[6] k = {{1, 2, 3, 4, 5, 6}}> {{ {body} }}")
    assert changed(model, sum_before_norms, 1) == ["Neg", "Add", "Sum", "LayerNormalization", "Add"]


@pytest.mark.parametrize("order", ["q, a", "a, q"])
def test_silu_of_codes_is_one_node(order: str) -> None:
    model = written(f"{QUANTIZE} a = Sigmoid(q) y = Mul({order})")
    assert changed(model, one_node_silu, 1, whole=True) == ["QuantizeLinear", "DequantizeLinear", "QuickGelu"]


@pytest.mark.parametrize(
    "body",
    [
        "b = Neg(x) a = Sigmoid(b) y = Mul(b, a)",
        f"{QUANTIZE} a = Sigmoid(q) y = Mul(a, x)",
        f"{QUANTIZE} a = Sigmoid(q) b = Mul(q, a) y = Add(b, a)",
    ],
    ids=["of a float", "of another", "read twice"],
)
def test_sigmoids_that_stay(body: str) -> None:
    assert "Sigmoid" in changed(written(body), one_node_silu, 0, whole=True)


def test_prelu_is_two_halves() -> None:
    body = "a = PRelu(x, k) b = Neg(a) y = PRelu(b, k)"
    model = onnx.parser.parse_model(f"{HEAD} <float[2,1,1] k = {{0.25, -3}}> {{ {body} }}")
    assert changed(model, prelu_of_halves, 2) == ["Max", "Min", "Mul", "Add", "Neg", "Max", "Min", "Mul", "Add"]


NARROW = "float lo = {-0.7}, float hi = {0.8}, float off = {0.83}, float far = {30}, float low = {-3}, int8 z8 = {-3}"


def clipped(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} <{CONSTANTS}, {NARROW}> {{ {body} }}")
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("point", ["z", "z8"])
def test_a_clip_to_fewer_codes_stands_on_the_codes(point: str) -> None:
    """With its name, which `verify_onnx` reads; a kernel then takes the quantizer up."""
    model = clipped(f"p = Clip(x, lo, hi) c = QuantizeLinear(p, s, {point}) y = DequantizeLinear(c, s, {point})")
    assert changed(model, clip_codes, 1) == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))
    clip_codes(found.graph)
    names = [node.outputs[0].name for node in found.graph]
    assert names == ["c@wide", "c", "y"]


def test_a_clip_that_others_read_stays_for_them_too() -> None:
    model = clipped("p = Clip(x, lo, hi) c = QuantizeLinear(p, s, z) q = DequantizeLinear(c, s, z) y = Add(q, p)")
    assert changed(model, clip_codes, 1) == ["Clip", "QuantizeLinear", "Clip", "DequantizeLinear", "Add"]


@pytest.mark.parametrize(
    ("edges", "point"),
    [("lo, off", "z"), ("low, far", "z"), ("lo", "z"), ("lo, m", "z"), ("lo, hi", "z16")],
    ids=["between codes", "all that bytes hold", "one edge", "computed", "of wider codes"],
)
def test_clips_of_floats_that_stay(edges: str, point: str) -> None:
    quantized = f"c = QuantizeLinear(p, s, {point}) y = DequantizeLinear(c, s, {point})"
    body = f"m = ReduceMax <keepdims = 0> (x) p = Clip(x, {edges}) {quantized}"
    model = onnx.parser.parse_model(f"{HEAD} <{CONSTANTS}, {NARROW}, uint16 z16 = {{7}}> {{ {body} }}")
    assert changed(model, clip_codes, 0)[-3:] == ["Clip", "QuantizeLinear", "DequantizeLinear"]
