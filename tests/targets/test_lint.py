"""lint_onnx: for each rule a tiny graph that breaks that rule alone, and its twin that breaks none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from fxquant.errors import ExportError, InvalidArgument
from fxquant.onnx import LintReport, lint_onnx
from fxquant.onnx.lint import rules
from tests.onnx.graphs import BOOL, FLOAT, Graph

FP8, FP4, INT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.int4


@dataclass(frozen=True)
class Case:
    """``build(graph, broken)`` writes nodes and returns the graph's output; ``said`` stands in the finding."""

    rule: str
    build: Callable[[Graph, bool], str]
    said: str
    target: str = "tensorrt"
    opset: int = 21
    broken_opset: int | None = None
    checked: bool = True  # off for operators that onnx does not know


def lint(case: Case, broken: bool, folder: Path) -> LintReport:
    graph = Graph()
    output = case.build(graph, broken)
    opset = case.broken_opset if broken and case.broken_opset else case.opset
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    body = helper.make_graph(graph.nodes, "graph", graph.inputs, [], graph.constants)
    model = helper.make_model(body, opset_imports=domains, ir_version=11)
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.append(types.get(output) or helper.make_tensor_value_info(output, FLOAT, None))
    if case.checked:
        onnx.checker.check_model(model, full_check=True)
    path = folder / f"{'broken' if broken else 'sound'}.onnx"
    onnx.save(model, path)
    return lint_onnx(path, case.target)


# ---------------------------------------------------------------- parts


def pair(g: Graph, x: str, scale: Any = 0.05, zero_point: int = 0, dtype: Any = np.int8, **attributes: Any) -> str:
    return g.qdq(x, scale, zero_point, dtype, **attributes)


def matrix(g: Graph, x: str) -> str:
    """The product with a weight [8, 8] that breaks no rule."""
    return g.op("MatMul", x, g.weight(8, 8, axis=1))


def image(g: Graph, name: str = "x") -> str:
    return g.input(2, 4, 6, 6, name=name)


def vectors(g: Graph, name: str = "x") -> str:
    return g.input(2, 8, 8, name=name)


def stored(g: Graph, shape: tuple[int, ...], scale: Any, dtype: Any, **attributes: Any) -> str:
    """Codes of a type in the file after a DequantizeLinear; ``scale`` is an array or the name of a value."""
    codes = g.const(np.ones(shape, dtype))
    if isinstance(scale, str):
        return g.op("DequantizeLinear", codes, scale, **attributes)
    zero = g.const(np.zeros(scale.shape, dtype))
    return g.op("DequantizeLinear", codes, g.const(scale.astype(np.float32)), zero, **attributes)


# ---------------------------------------------------------------- rules for all targets


def _plain(g: Graph, broken: bool) -> str:
    return matrix(g, pair(g, vectors(g)))


def _scale(value: float) -> Callable[[Graph, bool], str]:
    return lambda g, broken: matrix(g, pair(g, vectors(g), value if broken else 0.05))


def _computed_scale(g: Graph, broken: bool) -> str:
    x, scale = vectors(g), g.const(np.float32(0.05))
    if broken:
        scale = g.op("ReduceMax", x, keepdims=0)
    zero = g.const(np.int8(0))
    return matrix(g, g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero))


def _zero_point(g: Graph, broken: bool) -> str:
    x, scale, zero = vectors(g), g.const(np.float32(0.05)), g.const(np.int8(0))
    if not broken:
        return matrix(g, g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero))
    return matrix(g, g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale), scale))


def _zero_point_implied(g: Graph, broken: bool) -> str:
    x, scale = vectors(g), g.const(np.float32(0.05))
    given = {} if broken else {"output_dtype": onnx.TensorProto.INT8}
    return matrix(g, g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, **given), scale))


def _zero_point_shape(g: Graph, broken: bool) -> str:
    codes, scale = g.const(np.ones((8, 8), np.int8)), g.const(np.full(8, 0.1, np.float32))
    zero = g.const(np.zeros(1 if broken else 8, np.int8))
    return g.op("MatMul", pair(g, vectors(g)), g.op("DequantizeLinear", codes, scale, zero, axis=1))


def _axis(g: Graph, broken: bool) -> str:
    weight = stored(g, (8, 8), np.full(8, 0.1), np.int8, **({} if broken else {"axis": 1}))
    return g.op("MatMul", pair(g, vectors(g)), weight)


def _count(g: Graph, broken: bool) -> str:
    return g.op("MatMul", pair(g, vectors(g)), stored(g, (8, 8), np.full(3 if broken else 8, 0.1), np.int8, axis=1))


def _twice(g: Graph, broken: bool) -> str:
    x = vectors(g)
    first = pair(g, x)
    return g.op("Add", matrix(g, first), matrix(g, pair(g, x, 0.1) if broken else first))


def _again(g: Graph, broken: bool) -> str:
    first = pair(g, vectors(g))
    return matrix(g, pair(g, first) if broken else first)


def _batch_norm(g: Graph, broken: bool) -> str:
    y = g.conv(pair(g, image(g)))
    values = [g.const(np.ones(4, np.float32)) for _ in range(4)]
    return g.op("BatchNormalization", y, *values) if broken else g.op("Relu", y)


def _float_beside(g: Graph, broken: bool) -> str:
    shape = g.const(np.array([2, 8, 8]))
    x, y = pair(g, vectors(g)), vectors(g, "y")
    return g.op("MatMul", g.op("Reshape", x, shape), y if broken else pair(g, y))


def _float_after_moves(g: Graph, broken: bool) -> str:
    x, y = pair(g, vectors(g)), g.input(2, 8, 8, 1, name="y")
    axes = g.const(np.array([3]))
    return g.op("MatMul", x, g.op("Squeeze", y if broken else pair(g, y), axes))


def _weight_axis(g: Graph, broken: bool) -> str:
    return g.op("MatMul", pair(g, vectors(g)), g.weight(8, 8, axis=0 if broken else 1))


def _transposed_weight_axis(g: Graph, broken: bool) -> str:
    weight = g.op("Transpose", g.weight(8, 8, axis=1 if broken else 0), perm=[1, 0])
    return g.op("MatMul", pair(g, vectors(g)), weight)


def _convolution_axis(g: Graph, broken: bool) -> str:
    return g.op("Conv", pair(g, image(g)), g.weight(4, 4, 3, 3, axis=1 if broken else 0))


COMMON = [
    Case("opset-is-read", _plain, "opset 25 is beyond 24, the highest for tensorrt", opset=24, broken_opset=25),
    Case("scale-is-positive", _scale(0.0), "must be finite and above 0: got 0 to 0"),
    Case("scale-is-positive", _scale(-0.5), "got -0.5 to -0.5"),
    Case("scale-is-positive", _scale(float("nan")), "got nan to nan"),
    Case("scale-is-positive", _scale(float("inf")), "got inf to inf"),
    Case("scale-is-positive", _computed_scale, "its scale is computed at run time"),
    Case("zero-point-is-given", _zero_point, "it has no zero point", "generic"),
    Case("zero-point-is-given", _zero_point_implied, "it has no zero point", "generic"),
    Case("zero-point-is-given", _zero_point_shape, r"differ in shape: \(8,\) and \(1,\)"),
    Case("axis-is-given", _axis, "it has 8 scales and no axis"),
    Case("scale-fits-the-axis", _count, r"shape \(3,\) on axis 1 of a tensor of shape \(8, 8\): \(8,\) would fit"),
    Case("one-quantizer-per-tensor", _twice, "its input is quantized by QuantizeLinear '.*' too"),
    Case("one-quantizer-per-tensor", _again, "it quantizes what was just dequantized"),
    Case("batch-norm-is-folded", _batch_norm, "it stands after Conv 'conv', whose weight is quantized unfolded"),
    Case("operands-go-together", _float_beside, "operand 0 is quantized, operand 1 is not"),
    Case("operands-go-together", _float_after_moves, "operand 0 is quantized, operand 1 is not"),
    Case("weight-axis-is-the-output-channel", _weight_axis, "run along axis 0; MatMul '.*' .* channels on axis 1"),
    Case("weight-axis-is-the-output-channel", _transposed_weight_axis, "run along axis 1; MatMul .* on axis 0"),
    Case("weight-axis-is-the-output-channel", _convolution_axis, "run along axis 1; Conv .* on axis 0"),
]

# ---------------------------------------------------------------- TensorRT: formats


def _zero(g: Graph, broken: bool) -> str:
    return matrix(g, pair(g, vectors(g), zero_point=3 if broken else 0))


def _unsigned(g: Graph, broken: bool) -> str:
    return matrix(g, pair(g, vectors(g), dtype=np.uint8 if broken else np.int8))


def _bias(g: Graph, broken: bool) -> str:
    bias = stored(g, (4,), np.full(4, 0.1), np.int32, axis=0) if broken else g.floats(4)
    return g.op("Conv", pair(g, image(g)), g.weight(4, 4, 3, 3, axis=0), bias)


def _integers(g: Graph, broken: bool) -> str:
    if not broken:
        return _plain(g, broken)
    a, b = (g.input(2, 8, 8, dtype=onnx.TensorProto.UINT8, name=name) for name in "ab")
    return g.op("MatMulInteger", a, b)


def _per_channel(g: Graph, broken: bool) -> str:
    scale = np.full(8, 0.1, np.float32) if broken else 0.1
    return matrix(g, pair(g, vectors(g), scale, **({"axis": 1} if broken else {})))


def _output_dtype(g: Graph, broken: bool) -> str:
    given = {"output_dtype": FLOAT} if broken else {}
    return g.op("MatMul", pair(g, vectors(g)), stored(g, (8, 8), np.full(8, 0.1), np.int8, axis=1, **given))


def _transposed_convolution(g: Graph, broken: bool) -> str:
    weight = g.weight(4, 4, 3, 3, axis=1) if broken else stored(g, (4, 4, 3, 3), np.array(0.1), np.int8)
    return g.op("ConvTranspose", pair(g, image(g)), weight)


def _int4(rows: int, columns: int, block: int) -> Callable[[Graph, bool], str]:
    def build(g: Graph, broken: bool) -> str:
        k, n, size = (rows, columns, block) if broken else (128, 8, 64)
        return g.op(
            "MatMul", g.input(2, k), stored(g, (k, n), np.full((k // size, n), 0.1), INT4, axis=0, block_size=size)
        )

    return build


def _fp4(rows: int = 32, block: int = 16, kind: Any = FP8, scales: int = 1) -> Callable[[Graph, bool], str]:
    """NVFP4: both operands in fp4, with fp8 block scales after one float scale."""

    def build(g: Graph, broken: bool) -> str:
        k, size, dtype, count = (rows, block, kind, scales) if broken else (32, 16, FP8, 1)
        one = g.const(np.full(count, 0.5, np.float32) if count > 1 else np.float32(0.5))
        codes, small = "codes", "small"
        amax = g.const(np.float32(1.0))
        x = g.input(2, k)
        g.nodes.append(helper.make_node("TRT_FP4DynamicQuantize", [x, amax], [codes, small], domain="trt", name="q"))
        step = g.op("DequantizeLinear", small, g.const(np.float32(0.5)))
        left = g.op("DequantizeLinear", codes, step, axis=-1, block_size=16)
        shape = (-(-k // size), 8)
        blocks = g.const(np.ones(shape, dtype))
        given = {"axis": 1} if count > 1 else {}
        after = g.op(
            "DequantizeLinear", blocks, one, *([] if dtype is FP8 else [g.const(np.zeros((), dtype))]), **given
        )
        return g.op("MatMul", left, stored(g, (k, 8), after, FP4, axis=0, block_size=size))

    return build


def _fp4_activation(g: Graph, broken: bool) -> str:
    if not broken:
        return _fp4()(g, False)
    scale = g.const(np.float32(0.5))
    codes = g.op("QuantizeLinear", g.input(2, 32), scale, g.const(np.zeros((), FP4)))
    return g.op("Identity", codes)


def _mxfp8(rows: int, block: int) -> Callable[[Graph, bool], str]:
    def build(g: Graph, broken: bool) -> str:
        k, size = (rows, block) if broken else (64, 32)
        weight = stored(g, (k, 8), np.full((-(-k // size), 8), 0.5), FP8, axis=0, block_size=size)
        return g.op("MatMul", pair(g, g.input(2, k), dtype=FP8), weight)

    return build


FORMATS = [
    Case("zero-point-is-zero", _zero, r"its zero point must be 0: got \[3\]"),
    Case("codes-are-known", _unsigned, "its codes are uint8: TensorRT has no such codes there"),
    Case("codes-are-known", _bias, "its codes are int32: an int32 bias must stay float"),
    Case("no-integer-operators", _integers, "TensorRT does not read MatMulInteger"),
    Case("activations-have-one-scale", _per_channel, "an activation has 8 scales: TensorRT takes one"),
    Case("no-output-dtype", _output_dtype, "output_dtype on a DequantizeLinear is not read", opset=23),
    Case("transposed-convolution-has-one-scale", _transposed_convolution, "4 scales on the weight of ConvTranspose"),
    Case("int4-is-in-blocks", _int4(128, 8, 32), "must hold 64 or 128 codes: got 32"),
    Case("int4-is-in-blocks", _int4(64, 7, 64), r"must have an even last dimension: got shape \(64, 7\)"),
    Case("fp4-is-in-blocks", _fp4(rows=40), "axis 0 of its codes must be a multiple of 16: got 40", checked=False),
    Case("fp4-is-in-blocks", _fp4(block=32), "its blocks must hold 16 codes: got 32", checked=False),
    Case("fp4-is-in-blocks", _fp4(kind=np.int8), "its scales must be fp8 codes", checked=False),
    Case("fp4-is-in-blocks", _fp4(scales=8), "fp8 block scales must have one float scale", checked=False),
    Case("fp4-is-in-blocks", _fp4_activation, "become fp4 by trt::TRT_FP4DynamicQuantize", opset=23, checked=False),
    Case("fp8-blocks-hold-32", _mxfp8(64, 16), "its blocks must hold 32 codes: got 16"),
    Case("fp8-blocks-hold-32", _mxfp8(48, 32), "axis 0 of its codes must be a multiple of 32: got 48"),
]

# ---------------------------------------------------------------- TensorRT: places


def _weight_only(g: Graph, broken: bool) -> str:
    x = vectors(g)
    return matrix(g, x if broken else pair(g, x))


def _result(g: Graph, broken: bool) -> str:
    y = g.op("Relu", _plain(g, False))
    return pair(g, y) if broken else y


def _pool(g: Graph, broken: bool) -> str:
    y = g.op("AveragePool", pair(g, image(g)), kernel_shape=[2, 2])
    return y if broken else pair(g, y)


def _skip(g: Graph, broken: bool) -> str:
    x, y = image(g), image(g, "y")
    return g.op("Add", g.conv(pair(g, x)), y if broken else pair(g, y))


def _two_convolutions(g: Graph, broken: bool) -> str:
    x = pair(g, image(g))
    short = g.conv(x, name="short")
    return g.op("Add", g.conv(x), short if broken else pair(g, short))


def _quantized_sum(g: Graph, broken: bool) -> str:
    y = g.conv(pair(g, image(g)))
    return pair(g, g.op("Add", pair(g, y) if broken else y, pair(g, image(g, "y"))))


def _relu(g: Graph, broken: bool) -> str:
    y = g.conv(pair(g, image(g)))
    return g.conv(pair(g, g.op("Relu", pair(g, y) if broken else y)), name="next")


def _pad(g: Graph, broken: bool) -> str:
    pads = g.const(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    x = image(g)
    return g.conv(pair(g, g.op("Pad", x, pads)) if broken else g.op("Pad", pair(g, x), pads))


def _transpose(g: Graph, broken: bool) -> str:
    x = vectors(g)
    if broken:
        return matrix(g, g.op("Identity", g.op("Transpose", pair(g, x), perm=[0, 2, 1])))
    return matrix(g, pair(g, g.op("Transpose", pair(g, x), perm=[0, 2, 1])))


def _cast(g: Graph, broken: bool) -> str:
    x = pair(g, vectors(g))
    return matrix(g, g.op("Cast", x, to=FLOAT) if broken else x)


def _cast_weight(g: Graph, broken: bool) -> str:
    weight = g.weight(8, 8, axis=1)
    return g.op("MatMul", pair(g, vectors(g)), g.op("Cast", weight, to=FLOAT) if broken else weight)


def _factor(g: Graph, broken: bool) -> str:
    half, x = g.const(np.float32(0.5)), pair(g, vectors(g))
    return matrix(g, g.op("Mul", x, half) if broken else pair(g, g.op("Mul", x, half)))


# ---------------------------------------------------------------- TensorRT: attention


def _scores(op: str) -> Callable[[Graph, bool], str]:
    def build(g: Graph, broken: bool) -> str:
        factor = g.const(np.float32(0.5))
        q, k = vectors(g), pair(g, vectors(g, "k"))
        scores = g.op("MatMul", pair(g, q if broken else g.op(op, q, factor)), k)
        scores = g.op("Add", g.op(op, scores, factor) if broken else scores, vectors(g, "mask"))
        return g.op("Softmax", scores)

    return build


def _masked(g: Graph, broken: bool) -> str:
    factor, low = g.const(np.float32(0.5)), g.const(np.float32(-1e9))
    scores = g.op("MatMul", pair(g, vectors(g)), pair(g, vectors(g, "k")))
    scores = g.op("Mul", scores, factor) if broken else scores
    return g.op("Softmax", g.op("Where", g.input(2, 8, 8, dtype=BOOL, name="keep"), scores, low))


def _fp8_attention(g: Graph, broken: bool) -> str:
    q, k, v = (vectors(g, name) for name in "qkv")
    probabilities = g.op("Softmax", g.op("MatMul", *(pair(g, x, dtype=FP8) for x in (q, k))))
    operands = (probabilities, v) if broken else (pair(g, probabilities, dtype=FP8), pair(g, v, dtype=FP8))
    return g.op("MatMul", *operands)


PLACES = [
    Case("every-input-is-quantized", _weight_only, "its weight is quantized, its operand 0 is not"),
    Case("results-of-products-stay-float", _result, "the result of MatMul '.*', which nothing reads as integers"),
    Case("other-layers-have-both-sides", _pool, "what it reads is quantized, its result is not"),
    Case("skip-is-quantized", _skip, "its operand 1 must be quantized"),
    Case("skip-is-quantized", _two_convolutions, "both operands come out of convolutions"),
    Case("nothing-between-convolution-and-add", _quantized_sum, "Q/DQ stands between it and the convolution"),
    Case("nothing-between-convolution-and-activation", _relu, "Q/DQ stands between it and Conv 'conv'"),
    Case("nothing-between-pad-and-convolution", _pad, "Q/DQ stands between it and Pad"),
    Case("nothing-between-dequantize-and-product", _transpose, "it stands between DequantizeLinear '.*' and MatMul"),
    Case("nothing-between-dequantize-and-product", _cast, "it stands between DequantizeLinear '.*' and MatMul"),
    Case("nothing-between-dequantize-and-product", _cast_weight, "it stands between DequantizeLinear '.*' and MatMul"),
    Case("nothing-between-dequantize-and-product", _factor, "it stands between DequantizeLinear '.*' and MatMul"),
    Case("attention-is-scaled-before-the-product", _scores("Mul"), "it scales the scores of MatMul"),
    Case("attention-is-scaled-before-the-product", _scores("Div"), "it scales the scores of MatMul"),
    Case("attention-is-scaled-before-the-product", _masked, "it scales the scores of MatMul"),
    Case("fp8-attention-is-whole", _fp8_attention, "reads fp8, its own operands are not all fp8"),
]

# ---------------------------------------------------------------- onnxruntime and OpenVINO


def _wide(g: Graph, broken: bool) -> str:
    return matrix(g, pair(g, vectors(g), dtype=np.int16 if broken else np.int8))


def _right(dtype: Any, zero_point: int) -> Callable[[Graph, bool], str]:
    def build(g: Graph, broken: bool) -> str:
        y = pair(g, vectors(g, "y"), 0.05, *((zero_point, dtype) if broken else (128, np.uint8)))
        return g.op("MatMul", pair(g, vectors(g)), g.op("Transpose", y, perm=[0, 2, 1]))

    return build


def _left(g: Graph, broken: bool) -> str:
    x = pair(g, vectors(g), 0.05, 7 if broken else 0, np.uint8)
    return g.op("Add", g.op("MatMul", x, pair(g, vectors(g, "y"))), matrix(g, pair(g, vectors(g, "z"), 0.05, 7)))


def _decoder(g: Graph, broken: bool) -> str:
    x = pair(g, image(g), 0.05, 7 if broken else 0, np.uint8)
    return g.op("ConvTranspose", x, g.weight(4, 4, 3, 3, axis=1))


def _blocks(codes: Any = INT4, rows: int = 64, count: int = 2, quantized: bool = False) -> Callable[[Graph, bool], str]:
    """A weight with scales for blocks of 32; the twin has int8 codes, or int4 ones beside a quantized activation."""

    def build(g: Graph, broken: bool) -> str:
        kind, k, n = (codes, rows, count) if broken else (INT4 if quantized else np.int8, 64, 2)
        x = g.input(2, k)
        weight = stored(g, (k, 8), np.full((n, 8), 0.1), kind, axis=0, block_size=32)
        return g.op("MatMul", pair(g, x) if quantized else x, weight)

    return build


COMMON += [
    Case("scale-fits-the-axis", _blocks(count=3), r"of shape \(3, 8\) on axis 0 .*: \(2, 8\) would", "onnxruntime"),
    Case("blocks-have-their-opset", _blocks(np.int8), "scales per block in opset 19", "onnxruntime", 21, 19, False),
]
RUNTIMES = [
    Case("blocks-beside-codes-are-int4", _blocks(np.int8, quantized=True), "its blocks of int8 codes", "onnxruntime"),
    Case("blocks-divide-the-axis", _blocks(rows=48), r"blocks of 32 do not divide axis 0 of .* \(48, 8\)", "openvino"),
    Case("activation-codes-are-bytes", _wide, "its codes are int16", "onnxruntime"),
    Case("right-operand-is-symmetric", _right(np.int8, 3), "got int8 codes with zero point 3", "openvino"),
    Case("right-operand-is-symmetric", _right(np.uint8, 0), "got uint8 codes with zero point 0", "openvino"),
    Case("zero-point-of-operand-is-zero", _left, "zero point of its operand 0 must be 0: got 7", "openvino"),
    Case("zero-point-of-operand-is-zero", _decoder, "zero point of its operand 0 must be 0: got 7", "openvino"),
]

CASES = [*COMMON, *FORMATS, *PLACES, *RUNTIMES]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{case.build.__name__.strip('_')}" for case in CASES])
def test_a_rule_is_broken_alone_and_kept_by_the_twin(case: Case, tmp_path: Path) -> None:
    broken, sound = (lint(case, which, tmp_path) for which in (True, False))
    assert {finding.rule for finding in broken.findings} == {case.rule}, str(broken)
    assert re.search(case.said, broken.findings[0].message), str(broken)
    assert sound and not sound.findings, str(sound)


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "onnxruntime", "generic"])
def test_every_rule_has_such_a_pair(target: str) -> None:
    tested = {case.rule for case in CASES if case in COMMON or case.target == target}
    assert rules(target).keys() == tested
    assert all(text.endswith(".") for text in rules(target).values())


def test_a_u8_right_operand_around_128_is_symmetric(tmp_path: Path) -> None:
    """The twin of that rule; its own test can fail, since zero point 0 in uint8 codes is refused."""
    case = Case("right-operand-is-symmetric", _right(np.uint8, 128), "", "openvino")
    assert lint(case, True, tmp_path)


@pytest.mark.parametrize(
    ("target", "rule"), [("tensorrt", "nothing-between-dequantize-and-product"), ("generic", "operands-go-together")]
)
def test_one_finding_where_a_rule_of_the_target_s_own_says_it(target: str, rule: str, tmp_path: Path) -> None:
    """A Cast hides an operand's DequantizeLinear: TensorRT says so itself, for others the operand is float."""

    def between(g: Graph, broken: bool) -> str:
        y = pair(g, vectors(g, "y"))
        return g.op("MatMul", pair(g, vectors(g)), g.op("Cast", y, to=FLOAT) if broken else y)

    case = Case(rule, between, "", target)
    assert [finding.rule for finding in lint(case, True, tmp_path).findings] == [rule]
    assert lint(case, False, tmp_path)


def test_scales_of_a_target_s_own_quantizer_are_none_for_another(tmp_path: Path) -> None:
    assert lint(Case("", _fp4(), "", "tensorrt", checked=False), False, tmp_path)
    found = lint(Case("", _fp4(), "", "generic", checked=False), False, tmp_path)
    assert {finding.message for finding in found.findings} >= {"its scale is computed at run time"}


def test_a_report_names_node_rule_and_count(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.rule == "skip-is-quantized")
    report = lint(case, True, tmp_path)
    (finding,) = report.findings
    assert not report and report.target == "tensorrt" and report.checked == 5
    assert str(finding).startswith("add_") and str(finding).endswith("[skip-is-quantized]")
    assert f"{tmp_path / 'broken.onnx'} for tensorrt: 1 findings in 5 nodes" in str(report)
    assert report.to_dict()["findings"] == [vars(finding)]
    assert str(lint(case, False, tmp_path)) == f"{tmp_path / 'sound.onnx'} for tensorrt: 0 findings in 7 nodes"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"target must be one of 'onnxruntime'.*got 'tensorflow'"):
        lint_onnx(tmp_path / "none.onnx", "tensorflow")
    with pytest.raises(InvalidArgument, match="target must be one of"):
        rules("tensorflow")
    with pytest.raises(ExportError, match="must be an ONNX model"):
        lint_onnx(tmp_path / "none.onnx", "tensorrt")
