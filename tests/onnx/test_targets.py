"""What differs in the files of the targets, and what does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import ExportError
from fxquant.onnx import levels, lint_onnx
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import Recipe
from fxquant.targets import registry
from fxquant.targets.cpu import sums_saturate
from fxquant.targets.session import EXACT_SUMS, run_outputs
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import calibrated
from tests.onnx.nets import EXACT, IMAGE, exported, scores_file, shown


class Normed(nn.Module):
    """Convolution and transposed convolution, each with a BatchNorm, in groups or not."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.down, self.one = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, bias=False), nn.BatchNorm2d(6)
        self.up, self.two = nn.ConvTranspose2d(6, 4, 2, 2, groups=groups), nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.two(self.up(F.relu(self.one(self.down(x)))))))


PER_TENSOR = Recipe(name="per-tensor", weight=QuantSpec(narrow=True, range=CurrentTensor()))


@pytest.mark.parametrize("recipe", ["int8", PER_TENSOR], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("target", ["generic", "openvino"])  # of TensorRT, whose second layer is float, see its nets
def test_batch_norm_is_folded(target: str, groups: int, recipe: str | Recipe, tmp_path: Path) -> None:
    """Trained with batch statistics first: the codes are those of the weight that training then quantizes."""
    if target == "openvino":
        pytest.importorskip("openvino")
    torch._dynamo.reset()  # twelve preparations of one class are more than Dynamo compiles for it
    torch.manual_seed(0)
    model = fxquant.prepare(Normed(groups), (IMAGE,), target=target, recipe=recipe)
    for norm in (model.one, model.two):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
    step = torch.compile(model, backend="fxquant_eager")
    for _ in range(3):
        step(IMAGE).square().mean().backward()
    model.eval()
    path = tmp_path / "net.onnx"
    report = fxquant.export_onnx(model, (IMAGE,), path)
    assert not any("BatchNorm" in note for note in report.notes)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    assert lint_onnx(path, target), str(lint_onnx(path, target))
    verified = fxquant.verify_onnx(model, (IMAGE,), path)
    assert_codes_agree(verified)
    assert verified.output_spread > 1e-5


def test_other_targets_keep_the_order_of_the_model(tmp_path: Path) -> None:
    assert_expected_inline(
        shown(scores_file("openvino", tmp_path)),
        """\
matmul0_rhs = QuantizeLinear(k, const0, const0)
quantize_dequantize = DequantizeLinear(matmul0_rhs, const0)
matmul0_lhs = QuantizeLinear(q, const0, const0)
quantize_dequantize_1 = DequantizeLinear(matmul0_lhs, const0)
transpose = Transpose(quantize_dequantize)
matmul = MatMul(quantize_dequantize_1, transpose)
mul = Mul(matmul, const0)
softmax = Softmax(mul)
""",
    )


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "generic"])
def test_a_folded_bias_of_a_linear_without_one_is_in_the_file(target: str, tmp_path: Path) -> None:
    """A running mean of 3 under weights of about 0: without the folded bias, the outputs' mean would be off by 3."""
    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8)).eval()
    model[1].running_mean.fill_(3.0)
    x = torch.randn(64, 16)
    expected = model(x).detach().numpy()
    fxquant.prepare(model, (x,), target=target)
    fxquant.calibrate(model, [x], progress=False)
    report = fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert not report.notes
    (found,) = run_outputs(tmp_path / "m.onnx", {"input": x.numpy()}, optimize=True, config=EXACT_SUMS)
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.01) and found.mean() < -2.5


@pytest.mark.parametrize(("target", "op"), [("onnxruntime", "Sub"), ("tensorrt", "Add"), ("openvino", "Add")])
def test_a_bias_is_subtracted_for_onnxruntime_only(target: str, op: str, tmp_path: Path) -> None:
    model, _, path = exported("mlp", target, tmp_path)
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    biases = [held[node.input[1]] for node in graph.node if node.op_type == op]
    sign = -1 if op == "Sub" else 1
    assert len(biases) == 2 and {"Add", "Sub"} & {node.op_type for node in graph.node} == {op}
    np.testing.assert_array_equal(biases[0] * sign, model[0].bias.detach().numpy())


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_moved_int8_codes_load_in_onnxruntime_with_its_optimizations(target: str, tmp_path: Path) -> None:
    """Heads cut out of a quantized tensor, in sizes that are known: its optimizer moves the pairs, and adds some."""
    if target == "openvino":
        pytest.importorskip("openvino")

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k = (f(x).view(2, 7, 2, 8).transpose(1, 2) for f in (self.q, self.k))
            return F.scaled_dot_product_attention(q, k, q)

    torch.manual_seed(0)
    x = torch.randn(2, 7, 16)
    model = fxquant.prepare(Heads().eval(), (x,), target=target)
    fxquant.calibrate(model, [x], progress=False)
    path = tmp_path / "heads.onnx"
    fxquant.export_onnx(model, (x,), path, dynamic_batch=False)
    plain, optimized = (run_outputs(path, {"x": x.numpy()}, optimize=on)[0] for on in (False, True))
    np.testing.assert_allclose(optimized, plain, atol=0.01 * np.ptp(plain))
    assert_codes_agree(fxquant.verify_onnx(model, (x,), path, rounds=1))


class Padded(nn.Module):
    """A table, a convolution padded on one side, and a residual before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(64, 8), nn.Conv2d(1, 4, 3, 2)
        self.one, self.norm, self.two = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 5)
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(F.pad(self.table(x).unsqueeze(1), [0, 1, 0, 1]))).flatten(2).transpose(1, 2)
        y = self.slope(y.reshape(y.shape[0], -1, 32))
        return self.two(self.norm(y + self.one(y)))


def test_forms_that_runtimes_run_faster(tmp_path: Path) -> None:
    """Rows of codes are picked, the convolution pads, sums stay out of norms, SiLU is one node and PReLU none."""
    torch.manual_seed(0)
    ids, path = torch.randint(0, 64, (2, 8)), tmp_path / "net.onnx"
    model = calibrated(Padded(), ids, recipe=EXACT)
    report = fxquant.export_onnx(model, (ids,), path)
    assert not report.notes
    text = shown(path)
    assert "Gather(const2, x)" in text and "Pad(" not in text and text.count("Sum(") == 1
    assert "QuickGelu(" in text and "PRelu(" not in text
    verified = fxquant.verify_onnx(model, (ids,), path, rounds=0)
    assert not sum(row.differing for row in verified.codes)
    assert all(row.integer for row in verified.rows)
    pytest.importorskip("openvino")  # which refuses a Pad of codes whose zero point is not 0
    assert fxquant.verify_onnx(model, (ids,), path, rounds=0, runtime="openvino").outputs_within_code == 1


def test_codes_that_cannot_be_read_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file runs: a copy of it with more outputs may be refused."""
    pytest.importorskip("openvino")
    target = registry.TARGETS["openvino"]
    assert target.runtime is not None
    x = torch.randn(2, 8)
    model = calibrated(nn.Sequential(nn.Linear(8, 4)), x, target="openvino")
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")

    def refuse(*args: object, **kwargs: object) -> list[object]:
        raise ExportError("m.onnx must load: no such output\nand more")

    broken = dataclasses.replace(target.runtime, codes=refuse)
    monkeypatch.setitem(registry.TARGETS, "openvino", dataclasses.replace(target, runtime=broken))
    report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert report.runtime_codes == () and report.runtime_codes_error == "m.onnx must load: no such output"
    assert f"the codes that {report.runtime} itself has were not read: m.onnx must load: no such" in str(report)
    assert report.outputs_within_code == 1
    monkeypatch.setattr(levels, "LARGE", 100)
    large = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert "itself has were not read: files of more than 256 MiB are not loaded again" in str(large)


class Sum(nn.Module):
    """A convolution's result and something without negative values, summed, and read by a convolution that shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.show = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        with torch.no_grad():
            self.show.weight.copy_(torch.eye(8)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.show(F.relu(self.conv(x) + F.relu(x)))


@pytest.mark.skipif(sums_saturate(), reason="this CPU's 8-bit sums saturate")
def test_openvino_has_the_codes_of_a_sum_that_it_takes_into_a_convolution(tmp_path: Path) -> None:
    """OpenVINO would add the convolution's own codes before it rounds to them: its result has none here."""
    pytest.importorskip("openvino")
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    model = calibrated(Sum(), x, target="openvino")
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert report.differing_codes == 0 and report.compared_codes > 0
    assert report.optimized_output_difference < 1e-5  # one code of the sum is 0.015
    assert {row.key: row.differing for row in report.runtime_codes} == {row.key: 0 for row in report.codes}
    assert [site.key for site in fxquant.explain(model).rows if "add" in site.key] == ["add0_rhs"]


@pytest.mark.skipif(sums_saturate(), reason="this CPU's 8-bit sums saturate")
def test_verify_sees_codes_that_openvino_does_not_round_to(tmp_path: Path) -> None:
    """onnxruntime's file has codes of the convolution's result, which OpenVINO swallows: those of the sum are off."""
    pytest.importorskip("openvino")
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    model = calibrated(Sum(), x, target="onnxruntime")
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0, runtime="openvino")
    off = {row.key: row.differing / row.compared for row in report.runtime_codes}
    assert off.keys() == {row.key for row in report.codes} and off.pop("show.input") > 0.05
    assert {*off.values()} == {0.0} and report.differing_codes == 0
    assert "in OpenVINO 20" in str(report) and " itself, " in str(report) and "show.input" in str(report)
    assert [row["key"] for row in report.to_dict()["runtime_codes"]] == [row.key for row in report.runtime_codes]
