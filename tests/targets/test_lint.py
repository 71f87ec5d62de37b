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

from fxquant.errors import ExportError, InvalidArgument
from fxquant.onnx import LintReport, lint_onnx
from fxquant.onnx.lint import rules
from tests.onnx.graphs import FLOAT, Graph

FP8, FP4, INT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.int4


@dataclass(frozen=True)
class Case:
    """``build(graph, broken)`` writes nodes and returns the graph's output; ``said`` stands in the finding."""

    rule: str
    build: Callable[[Graph, bool], str]
    said: str
    target: str = "generic"
    opset: int = 21
    broken_opset: int | None = None
    checked: bool = True  # off for operators that onnx does not know


def lint(case: Case, broken: bool, folder: Path) -> LintReport:
    graph = Graph()
    output = case.build(graph, broken)
    opset = case.broken_opset if broken and case.broken_opset else case.opset
    path = folder / f"{'broken' if broken else 'sound'}.onnx"
    graph.write(path, output, opset=opset, checked=case.checked)
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


def _zero_point_implied_int8(g: Graph, broken: bool) -> str:
    x, scale, zero = vectors(g), g.const(np.float32(0.05)), g.const(np.int8(0))
    given, told = ([], {"output_dtype": onnx.TensorProto.INT8}) if broken else ([zero], {})
    return matrix(g, g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, *given, **told), scale))


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
    Case("opset-is-read", _plain, "opset 27 is beyond 26, the highest for generic", opset=26, broken_opset=27),
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
    Case("type-of-codes-is-a-zero-point", _zero_point_implied_int8, "its int8 codes are named by", "openvino"),
    Case("right-operand-is-symmetric", _right(np.int8, 3), "got int8 codes with zero point 3", "openvino"),
    Case("right-operand-is-symmetric", _right(np.uint8, 0), "got uint8 codes with zero point 0", "openvino"),
    Case("zero-point-of-operand-is-zero", _left, "zero point of its operand 0 must be 0: got 7", "openvino"),
    Case("zero-point-of-operand-is-zero", _decoder, "zero point of its operand 0 must be 0: got 7", "openvino"),
]

CASES = [*COMMON, *RUNTIMES]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{case.build.__name__.strip('_')}" for case in CASES])
def test_a_rule_is_broken_alone_and_kept_by_the_twin(case: Case, tmp_path: Path) -> None:
    broken, sound = (lint(case, which, tmp_path) for which in (True, False))
    assert {finding.rule for finding in broken.findings} == {case.rule}, str(broken)
    assert re.search(case.said, broken.findings[0].message), str(broken)
    assert sound and not sound.findings, str(sound)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "generic"])
def test_every_rule_has_such_a_pair(target: str) -> None:
    tested = {case.rule for case in CASES if case in COMMON or case.target == target}
    assert rules(target).keys() == tested
    assert all(text.endswith(".") for text in rules(target).values())


def test_a_u8_right_operand_around_128_is_symmetric(tmp_path: Path) -> None:
    """The twin of that rule; its own test can fail, since zero point 0 in uint8 codes is refused."""
    case = Case("right-operand-is-symmetric", _right(np.uint8, 128), "", "openvino")
    assert lint(case, True, tmp_path)


def test_a_cast_hides_the_pair_of_an_operand(tmp_path: Path) -> None:
    def between(g: Graph, broken: bool) -> str:
        y = pair(g, vectors(g, "y"))
        return g.op("MatMul", pair(g, vectors(g)), g.op("Cast", y, to=FLOAT) if broken else y)

    case = Case("operands-go-together", between, "")
    assert [finding.rule for finding in lint(case, True, tmp_path).findings] == ["operands-go-together"]
    assert lint(case, False, tmp_path)


def test_a_report_names_node_rule_and_count(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.rule == "batch-norm-is-folded")
    report = lint(case, True, tmp_path)
    (finding,) = report.findings
    assert not report and report.target == "generic" and report.checked == 5
    assert str(finding).startswith("batchnorm") and str(finding).endswith("[batch-norm-is-folded]")
    assert f"{tmp_path / 'broken.onnx'} for generic: 1 findings in 5 nodes" in str(report)
    assert report.to_dict()["findings"] == [vars(finding)]
    assert str(lint(case, False, tmp_path)) == f"{tmp_path / 'sound.onnx'} for generic: 0 findings in 5 nodes"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"target must be one of 'onnxruntime'.*got 'tensorflow'"):
        lint_onnx(tmp_path / "none.onnx", "tensorflow")
    with pytest.raises(InvalidArgument, match="target must be one of"):
        rules("tensorflow")
    with pytest.raises(ExportError, match="must be an ONNX model"):
        lint_onnx(tmp_path / "none.onnx", "tensorrt")
