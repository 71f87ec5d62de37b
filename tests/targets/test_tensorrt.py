"""TensorRT: files that NVIDIA's builder makes integers of and its rules find clean, with training's codes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline

import fxquant
from fxquant.errors import ExportError, MissingDependency
from fxquant.targets import tensorrt_run
from fxquant.targets.session import run_codes
from fxquant.targets.tensorrt_run import kernel_rows
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import calibrated
from tests.onnx.nets import NETS, exported, scores_file, shown

TRANSPOSED = "TensorRT has no integer transposed convolution"
FLOAT = {
    "unet-skip": {"node_convolution": TRANSPOSED},
    "attention-operator": {"node_matmul_4": "operand 0 is not quantized"},
    "decoder": {"node_convolution": TRANSPOSED, "node_convolution_1": TRANSPOSED},
    "decoder-with-norm": {"node_convolution": TRANSPOSED, "node_convolution_1": TRANSPOSED},
}


built = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


@pytest.fixture
def without_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is not installed."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@built
@pytest.mark.parametrize("name", NETS)
def test_tensorrt_export_is_clean_and_training_s_codes(name: str, tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported(name, "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint is not None and report.lint.target == "tensorrt"
    assert report.lint, str(report.lint)
    assert_codes_agree(report)
    assert report.output_spread > 1e-5
    assert report.runtime is not None and report.runtime.startswith("TensorRT for RTX 1.")
    assert {row.name: row.reason for row in report.rows if not row.integer} == FLOAT.get(name, {})
    assert report.rows and math.isnan(report.optimized_output_difference) and math.isnan(report.latency)


@built
@pytest.mark.parametrize("capability", ["8.6", "12.0"])
def test_it_is_built_for_a_card(capability: str, tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported("residual", "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path, runtime="tensorrt", capability=capability)
    assert report.integer_share == 1.0
    text = str(report)
    assert f"{path} in TensorRT for RTX" in text and "3 of 3 conv/gemm/matmul nodes run on integers" in text
    assert "convolution int8·int8" in text and f"{path} for tensorrt: 0 findings" in text


@built
def test_what_does_not_parse_is_told_in_nvidia_s_words_and_by_the_node_s_own_name(tmp_path: Path) -> None:
    _, _, path = exported("mlp", "tensorrt", tmp_path)
    edited = onnx.load(path)
    (point,) = [tensor for tensor in edited.graph.initializer if tensor.data_type == onnx.TensorProto.INT8][:1]
    edited.graph.node.append(onnx.helper.make_node("MatMulInteger", [point.name, point.name], ["none"], name="mine"))
    edited.graph.output.append(onnx.helper.make_tensor_value_info("none", onnx.TensorProto.INT32, None))
    onnx.save(edited, path)
    with pytest.raises(ExportError, match=r"net\.onnx must parse in TensorRT for RTX 1\..*MatMulInteger 'mine': "):
        kernel_rows(path)


@built
def test_a_builder_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, path = exported("mlp", "tensorrt", tmp_path)
    program = tmp_path / "program.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(tensorrt_run, "_PROGRAM", program)
    with pytest.raises(ExportError, match=r"must build in TensorRT for RTX 1\.[\d.]+: it ended with SIGSEGV"):
        kernel_rows(path)


def test_without_the_package_the_rules_are_the_proof(tmp_path: Path, without_builder: None) -> None:
    model, x, path = exported("mlp", "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.runtime is None and not report.rows and math.isnan(report.integer_share) and report.lint
    assert 'its kernels are not known without `pip install "fxquant[tensorrt]"`' in str(report)
    with pytest.raises(MissingDependency, match=r'pip install "fxquant\[tensorrt\]"`. It needs no GPU'):
        fxquant.verify_onnx(model, (x,), path, runtime="tensorrt")


class Long(torch.nn.Module):
    """A weight past what a protobuf may hold goes into a file of its own; here a small one is sent there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@built
def test_weights_in_a_file_of_their_own_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.onnx.write._EXTERNAL_BYTES", 1)
    x = torch.randn(4, 16)
    model = calibrated(Long(), x, target="tensorrt")
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.chdir(tmp_path.parent)
    assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == ["matrix product int8·int8"]


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


def test_tensorrt_report_holds_the_findings(tmp_path: Path, without_builder: None) -> None:
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
