"""TensorRT: files that NVIDIA's builder makes integers of and its rules find clean, with training's codes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import fxquant
from fxquant.__main__ import main
from fxquant.errors import ExportError, InvalidArgument, MissingDependency, UnsupportedModel
from fxquant.onnx import lint_onnx
from fxquant.prepared.root import plan_of
from fxquant.probe.visitor import Use, visiting
from fxquant.spec.recipes import get_recipe
from fxquant.targets import tensorrt_run
from fxquant.targets.tensorrt_run import kernel_rows
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import calibrated
from tests.onnx.nets import NETS, exported

TRANSPOSED = "TensorRT has no integer transposed convolution"
FLOAT = {
    "unet-skip": {"node_convolution": TRANSPOSED},
    "attention-operator": {"node_matmul_4": "operand 0 is not quantized"},
}


built = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


@pytest.fixture
def without_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is not installed."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@built
@pytest.mark.parametrize("name", [name for name in NETS if not name.startswith("decoder")])
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


def test_transposed_convolutions_alone_are_nothing_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"an operator that tensorrt runs on integers .*: found none"):
        exported("decoder", "tensorrt", tmp_path)


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


@built
def test_a_builder_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = exported("mlp", "tensorrt", tmp_path)
    program, started = tmp_path / "program.py", tmp_path / "started"
    program.write_text(
        f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(99)"
    )
    monkeypatch.setattr(tensorrt_run, "_PROGRAM", program)
    match = r"net\.onnx must build in TensorRT for RTX 1\.[\d.]+ within 2 s: it had not ended by then. Give a longer"
    with pytest.raises(ExportError, match=match):
        fxquant.verify_onnx(model, (x,), path, timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert main(["kernels", str(path), "--target", "tensorrt", "--timeout", "1"]) == 1


def test_a_time_limit_is_seconds_of_a_build(tmp_path: Path) -> None:
    model, x, path = exported("mlp", "tensorrt", tmp_path)
    with pytest.raises(InvalidArgument, match=r"^timeout must be seconds, above 0: got 0\.$"):
        fxquant.verify_onnx(model, (x,), path, timeout=0)
    with pytest.raises(
        InvalidArgument, match=r"^timeout must be left out for onnxruntime, which builds nothing: got 9\.$"
    ):
        fxquant.verify_onnx(model, (x,), path, runtime="onnxruntime", timeout=9)


def test_without_the_package_the_rules_are_the_proof(tmp_path: Path, without_builder: None) -> None:
    model, x, path = exported("mlp", "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.runtime is None and not report.rows and math.isnan(report.integer_share) and report.lint
    assert 'its kernels are not known without `pip install "fxquant[tensorrt]"`' in str(report)
    with pytest.raises(MissingDependency, match=r'pip install "fxquant\[tensorrt\]"`. It needs no GPU'):
        fxquant.verify_onnx(model, (x,), path, runtime="tensorrt")


@built
def test_int4_codes_of_convolutions_stay_int8(tmp_path: Path) -> None:
    """A build error otherwise. All products are integer ones: of matrices, the codes are widened as they run."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 8)
    )
    x = torch.randn(3, 4, 4, 4)
    model = calibrated(net, x, target="tensorrt", recipe="w4a8")
    assert all(row.kernels[0].startswith("int8 ") for row in fxquant.explain(model, (x,)).rows)
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", weight_storage="int4")
    assert report.notes[-2:] == (
        "2 weights stored as int4",
        "1 weights of convolutions stay int8: the runtime has no int4 ones",
    )
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx")
    assert verified.integer_share == 1.0 and verified.lint, str(verified)


@built
def test_activations_beside_blocks_are_float(tmp_path: Path) -> None:
    """TensorRT would use the first block's scales alone, without a word."""
    recipe = fxquant.Recipe(name="blocks", weight=get_recipe("int4_weight_only").weight)
    x = torch.randn(3, 64)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))
    model = calibrated(net, x, target="tensorrt", recipe=recipe)
    assert [site.key for site in plan_of(model).sites] == ["0.weight", "2.weight"]
    assert {declined.reason for declined in plan_of(model).declined} == {
        "its input: the runtime multiplies a weight with scales per group by floats"
    }
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    assert lint_onnx(tmp_path / "net.onnx", "tensorrt")
    assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == ["matrix product float·float"] * 2


@built
def test_a_weight_that_is_one_group_is_float_and_one_of_two_is_not(tmp_path: Path) -> None:
    """"ScaleMode is illegal" otherwise, in a build."""
    x = torch.randn(3, 64)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 1))
    wide = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
    model = calibrated(net, x, target="tensorrt", recipe="int4_weight_only")
    assert [site.key for site in plan_of(model).sites] == ["0.weight"]
    assert "its 32 values are one group, whose one scale tensorrt refuses" in str(fxquant.explain(model, (x,)))
    for number, each in enumerate((model, calibrated(wide, x, target="tensorrt", recipe="int4_weight_only"))):
        fxquant.export_onnx(each, (x,), tmp_path / f"{number}.onnx")
        assert len(kernel_rows(tmp_path / f"{number}.onnx")) == 2
    other = calibrated(torch.nn.Linear(32, 1), torch.randn(3, 32), target="onnxruntime", recipe="int4_weight_only")
    assert [site.key for site in plan_of(other).sites] == ["weight"]


def test_an_old_builder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("tensorrt_rtx")
    old.__version__ = "1.6.1.120"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", old)
    with pytest.raises(MissingDependency, match=r"must be 1\.7 or newer .* got 1\.6\.1\.120, .*pip install --upgrade"):
        kernel_rows(tmp_path / "net.onnx")


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


def test_codes_are_those_of_a_scale_s_reciprocal() -> None:
    """As in the kernels that TensorRT generates: x times 1/scale, rounded once; ONNX divides. Seen halfway of codes."""
    model = calibrated(torch.nn.Linear(1, 4), torch.linspace(-2.9, 2.9, 99).reshape(-1, 1), target="tensorrt")
    uses: dict[str, Use] = {}

    def visit(use: Use) -> None:
        uses[use.role] = use

    with visiting(model, "this test") as run:
        run((torch.ones(1, 1),), {}, visit)
        scale = np.float32(uses["activation"].scale.item())
        x = (np.arange(-128, 128, dtype=np.float32).reshape(-1, 1) + np.float32(0.5)) * scale
        run((torch.from_numpy(x),), {}, visit)
    codes = np.rint(np.clip(x * (np.float32(1) / scale), -128, 127)).astype(np.int8)
    divided = np.rint(np.clip(x / scale, -128, 127)).astype(np.int8)
    np.testing.assert_array_equal(uses["activation"].quantized.numpy(), codes.astype(np.float32) * scale)
    assert (codes != divided).any() and np.abs(codes.astype(int) - divided).max() == 1


class Attend(torch.nn.Module):
    """By the operator, or written out, so that its probabilities are quantized too."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.layer, self.out, self.written = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.layer(x).unflatten(-1, (2, 32)).transpose(1, 2)
        if self.written:
            y = torch.softmax(q @ q.transpose(-1, -2) / 3, -1) @ q
        else:
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float32, False), (torch.bfloat16, True)])
def test_attention_in_a_half_type_stays_whole(dtype: torch.dtype, whole: bool) -> None:
    model = fxquant.prepare(Attend(False).to(dtype), (torch.randn(2, 16, 64, dtype=dtype),), target="tensorrt")
    reasons = [declined.reason for declined in plan_of(model).declined]
    assert any("as one kernel, which codes of q and k would break" in reason for reason in reasons) == whole
    assert any(site.key.startswith("sdpa") for site in plan_of(model).sites) != whole


@built
def test_attention_that_is_written_out_is_one_integer_kernel(tmp_path: Path) -> None:
    x = torch.randn(2, 16, 64)
    model = calibrated(Attend(True), x, target="tensorrt")
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    rows = kernel_rows(tmp_path / "net.onnx")
    assert [row.kernel for row in rows if row.kernel.startswith("fused")] == ["fused attention int8·int8·int8"] * 2
    assert len(rows) == 4 and all(row.integer for row in rows)


def test_tensorrt_report_holds_the_findings(tmp_path: Path, without_builder: None) -> None:
    model, x, path = exported("average-pool", "tensorrt", tmp_path)
    edited = onnx.load(path)
    edited.opset_import[0].version = 26
    onnx.save(edited, path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint is not None and [finding.rule for finding in report.lint.findings] == ["opset-is-read"]
    text = str(report)
    assert "for tensorrt, which is not run here: its kernels are not known" in text
    assert "opset-is-read" in text and "in onnxruntime without optimizations" in text and "latency" not in text
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert fields["integer_share"] is None and fields["latency"] is None and fields["runtime"] is None
    assert fields["lint"]["findings"][0]["rule"] == "opset-is-read"
