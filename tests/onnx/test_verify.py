"""verify_onnx: measures what is there, and notices what is wrong."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch._dynamo.utils import counters

import fxquant
from fxquant.errors import ExportError, InvalidArgument
from fxquant.prepared.root import plan_of
from fxquant.support import progress
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import ConvNet, calibrated, snapshot


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    model = calibrated(ConvNet(), torch.randn(6, 3, 8, 8))
    path = tmp_path_factory.mktemp("verify") / "net.onnx"
    fxquant.export_onnx(model, (torch.randn(4, 3, 8, 8),), path)
    content, before = path.read_bytes(), snapshot(model)
    report = fxquant.verify_onnx(model, (torch.randn(16, 3, 8, 8),), path, rounds=2)
    assert path.read_bytes() == content and snapshot(model) == before
    return model, path, report


def test_every_weighted_node_is_an_integer_kernel(verified):
    _, _, report = verified
    assert [row.op_type for row in report.rows] == ["Conv", "Conv", "Conv", "MatMul"]
    assert report.integer_share == 1.0 and all(row.reason is None for row in report.rows)


def test_codes_are_training_s(verified):
    model, _, report = verified
    sites = [site for site in plan_of(model).sites if site.local.role != "weight"]
    assert {row.key for row in report.codes} == {site.key for site in sites}
    assert report.compared_codes == sum(row.compared for row in report.codes) > 10_000
    assert report.input_differing_codes == 0
    assert report.differing_codes <= report.compared_codes // 10_000


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_model_is_compiled_once(verified, runtime):
    """Levels and the runtime's own codes are compared by the same compiled graph."""
    pytest.importorskip(runtime)
    model, path, _ = verified
    before = counters["stats"]["unique_graphs"]
    report = fxquant.verify_onnx(model, (torch.randn(16, 3, 8, 8),), path, rounds=0, runtime=runtime)
    assert counters["stats"]["unique_graphs"] == before + 1
    assert len(report.levels) > 1 and bool(report.runtime_codes) == (runtime == "openvino")


class Sizes(nn.Module):
    """Results that are no floats; an input that nothing reads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, unread):
        y = self.layer(x)
        return y, y > 0, x.shape[0]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_results_that_are_no_floats_and_an_input_that_is_not_read(target, tmp_path):
    pytest.importorskip(target)
    args = torch.randn(4, 8), torch.randn(4, 8)
    model = fxquant.prepare(Sizes(), args, target=target)
    fxquant.calibrate(model, [args], progress=False)
    fxquant.export_onnx(model.eval(), args, tmp_path / "net.onnx")
    report = fxquant.verify_onnx(model, args, tmp_path / "net.onnx", rounds=0)
    assert report.compared_codes >= 32 and not report.differing_codes and report.outputs_within_code == 1
    assert report.max_output_difference < 1e-5
    assert [row.differing for row in report.runtime_codes] == [0] * len(report.runtime_codes)
    assert bool(report.runtime_codes) == (target == "openvino")


def test_a_constant_among_the_results_is_named(tmp_path):
    args = torch.randn(4, 8), torch.randn(4, 8)
    model = fxquant.prepare(Sizes(), args)
    fxquant.calibrate(model, [args], progress=False)
    told = r"outputs must be tensors or sizes: got the constant 4 as output 2\. Return it as a tensor, or leave it out"
    with pytest.raises(ExportError, match=told):
        fxquant.export_onnx(model.eval(), args, tmp_path / "net.onnx", dynamic_batch=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_reads_what_takes_long(tmp_path, monkeypatch):
    terminal, x = Terminal(), torch.randn(4, 3, 8, 8)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_QUIET", 0.01)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    model = calibrated(ConvNet(), x)
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
    fxquant.convert(model, (x,))
    said = terminal.getvalue()
    for line in ("prepare, 0 s", "export_onnx, 0 s: tracing the model", "verify_onnx, 0 s: comparing codes", "convert"):
        assert f"\r\033[K{line}" in said, said
    assert said.endswith("\r\033[K")


def test_report_prints_and_serializes(verified):
    _, _, report = verified
    fields = json.loads(json.dumps(report.to_dict()))
    for name in ("integer_share", "differing_codes", "max_output_difference", "latency_ratio", "rows"):
        assert name in fields
    text = str(report)
    assert "4 of 4 conv/gemm/matmul nodes run on integers (100.0 %)" in text
    assert "QLinearConv" in text and "MatMulIntegerToFloat" in text


def _edit(path: Path, target: Path, change) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, target)
    return target


def test_a_changed_scale_is_noticed(verified, tmp_path):
    model, path, _ = verified

    def widen(graph):
        names = {n.input[1] for n in graph.node if n.op_type == "QuantizeLinear" and n.output[0] == "stem.input"}
        for tensor in graph.initializer:
            if tensor.name in names:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))

    report = fxquant.verify_onnx(model, (torch.randn(4, 3, 8, 8),), _edit(path, tmp_path / "w.onnx", widen), rounds=0)
    assert report.input_differing_codes > 100 and report.largest_code_difference > 10
    assert "stem.input" in str(report)
    assert math.isnan(report.latency) and math.isnan(report.float_latency), "no rounds, no times"
    assert "latency" not in str(report)


def test_a_lost_quantizer_is_noticed(verified, tmp_path):
    model, path, _ = verified

    def rename(graph):
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == "head.input":
                        names[index] = "something"

    edited = _edit(path, tmp_path / "r.onnx", rename)
    with pytest.raises(InvalidArgument, match=r"an export of this model: it has no QuantizeLinear for head\.inp"):
        fxquant.verify_onnx(model, (torch.randn(4, 3, 8, 8),), edited)


def test_refusals(verified, tmp_path):
    model, path, _ = verified
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InvalidArgument, match="which does not exist"):
        fxquant.verify_onnx(model, (x,), tmp_path / "none.onnx")
    with pytest.raises(InvalidArgument, match="must be given a prepared model"):
        fxquant.verify_onnx(nn.Linear(2, 2), (x,), path)
    with pytest.raises(InvalidArgument, match=r"must hold the file's 1 inputs \(x\): got 2 tensors"):
        fxquant.verify_onnx(model, (x, x), path)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="must be an ONNX model"):
        fxquant.verify_onnx(model, (x,), tmp_path / "broken.onnx")


def test_a_tensor_that_no_input_reaches_is_compared_too(tmp_path):
    """Position embeddings of a fixed size: a constant to the file, an activation to the model."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            where = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.arange(8) / 10
            return self.fc(x) + self.fc(torch.sin(where))

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(3, 5, 8)
    fxquant.prepare(model, (x,))
    fxquant.calibrate(model, [x], progress=False)
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx", dynamic_batch=False)
    report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert_codes_agree(report)
    assert [row.key for row in report.codes] == ["fc.input", "fc.input@1"]  # one module, two tensors


def test_a_comparison_of_nothing_is_a_failure(verified):
    """Not agreement on 0 of 0 codes: of inputs without a value, or of a model that evaluates another operator."""
    model, path, _ = verified
    with pytest.raises(
        ExportError, match=r"got 0 codes of 7 sites \(avg_pool0_input, .* to compare\. Give inputs that are not"
    ):
        fxquant.verify_onnx(model, (torch.randn(0, 3, 8, 8),), path)


def test_a_residual_of_rank_two_without_a_bias_is_integer(tmp_path):
    """onnxruntime makes a float Gemm of a MatMul and an Add, of whatever it can broadcast."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.l = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
            self.twice, self.scaled, self.moved = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.w, self.b = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16))

        def forward(self, x):
            x = self.i(x).relu()
            y, z = (x + self.l(x)).relu() @ self.w + self.b, torch.addmm(x, x, self.w)
            twice = self.twice(x)
            return y, z, twice + twice, torch.add(self.scaled(x), x, alpha=2), self.moved(x) + 1.5

    torch.manual_seed(0)
    model, x, path = calibrated(Residual(), torch.randn(6, 16)), torch.randn(4, 16), tmp_path / "m.onnx"
    for dynamic in (True, False):
        fxquant.export_onnx(model, (x,), path, dynamic_batch=dynamic)
        report = fxquant.verify_onnx(model, (x,), path, rounds=0)
        assert len(report.rows) == 7 and report.integer_share == 1.0
        assert_codes_agree(report)


def test_a_model_that_takes_another_way_when_it_is_exported(tmp_path):
    """As a state-space model does, which exports a loop for its scan: what has another form is named, not compared."""

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.read = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            states = self.fc(x).cumsum(1)
            if torch.compiler.is_exporting():
                return torch.stack([self.read(states[:, i]) for i in range(x.shape[1])], 1)
            return self.read(states)

    torch.manual_seed(0)
    model, x, path = calibrated(Scan(), torch.randn(6, 3, 8)), torch.randn(4, 3, 8), tmp_path / "m.onnx"
    fxquant.export_onnx(model, (x,), path)
    report = fxquant.verify_onnx(model, (x,), path, rounds=0)
    assert report.not_compared == ("read.input",) and {row.key for row in report.codes} == {"fc.input"}
    assert "another form: read.input" in str(report) and report.max_output_difference < 0.1 * report.output_spread
