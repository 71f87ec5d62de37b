"""TensorRT: files that its rules find clean, with training's codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from expecttest import assert_expected_inline

import fxquant
from fxquant.targets.session import run_codes
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.nets import NETS, exported, scores_file, shown


@pytest.mark.parametrize("name", NETS)
def test_tensorrt_export_is_clean_and_training_s_codes(name: str, tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported(name, "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint is not None and report.lint.target == "tensorrt"
    assert report.lint, str(report.lint)
    assert_codes_agree(report)
    assert report.output_spread > 1e-5
    assert report.runtime is None and not report.rows and math.isnan(report.integer_share)


def test_transpose_and_scale_stand_before_the_quantizer_for_tensorrt(tmp_path: Path) -> None:
    assert_expected_inline(
        shown(scores_file("tensorrt", tmp_path)),
        """\
matmul0_rhs = QuantizeLinear(k, const0)
quantize_dequantize = DequantizeLinear(matmul0_rhs, const0)
matmul0_lhs = QuantizeLinear(q, const0)
quantize_dequantize_1 = DequantizeLinear(matmul0_lhs, const0)
transpose = Transpose(quantize_dequantize)
matmul0_rhs@transpose = QuantizeLinear(transpose, const0)
quantize_dequantize_2 = DequantizeLinear(matmul0_rhs@transpose, const0)
mul = Mul(quantize_dequantize_1, const0)
matmul0_lhs@mul_tensor = QuantizeLinear(mul, const0)
quantize_dequantize_3 = DequantizeLinear(matmul0_lhs@mul_tensor, const0)
matmul = MatMul(quantize_dequantize_3, quantize_dequantize_2)
softmax = Softmax(matmul)
""",
    )


def test_quantizing_again_gives_the_same_codes(tmp_path: Path) -> None:
    path = scores_file("tensorrt", tmp_path)
    rng = np.random.default_rng(0)
    codes = run_codes(path, {name: rng.normal(size=(3, 5, 8)).astype(np.float32) for name in ("q", "k")})
    again = {key.partition("@")[0]: value for key, value in codes.items() if "@" in key}
    assert len(again) == 2 and len(codes) == 4
    np.testing.assert_array_equal(again["matmul0_lhs"], codes["matmul0_lhs"])
    np.testing.assert_array_equal(again["matmul0_rhs"], codes["matmul0_rhs"].swapaxes(1, 2))


def test_tensorrt_report_holds_the_findings(tmp_path: Path) -> None:
    model, x, path = exported("average-pool", "tensorrt", tmp_path)
    edited = onnx.load(path)
    (weight,) = [n for n in edited.graph.node if n.input[0].startswith("head__weight")]
    del weight.attribute[:]  # of its axis, 1, which is the standard's default too
    onnx.save(edited, path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint is not None and [finding.rule for finding in report.lint.findings] == ["axis-is-given"]
    text = str(report)
    assert "for tensorrt, which is not run here: its kernels are not known" in text
    assert "axis-is-given" in text and "in onnxruntime without optimizations" in text and "latency" not in text
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert fields["integer_share"] is None and fields["latency"] is None and fields["runtime"] is None
    assert fields["lint"]["findings"][0]["rule"] == "axis-is-given"
