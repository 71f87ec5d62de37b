"""export_onnx: the file's form, that it is whole or absent, and that the model stays as it was."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import fxquant
from fxquant.errors import ExportError, InvalidArgument, MissingDependency, RangeNotSet
from fxquant.ops.qdq import QUANTIZE_DEQUANTIZE
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.targets import session as runtime
from tests.onnx.agreement import assert_codes_agree, deployed_difference
from tests.onnx.models import Attention, ConvNet, calibrated, snapshot


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, fxquant.onnx.ExportReport]:
    model = calibrated(ConvNet(), torch.randn(6, 3, 8, 8))
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    return model, path, fxquant.export_onnx(model, (torch.randn(4, 3, 8, 8),), path)


def test_every_site_is_one_quantizelinear_named_by_its_key(exported):
    model, path, report = exported
    graph = onnx.load(path).graph
    named = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    plan = plan_of(model)
    assert named == {site.key for site in plan.sites if site.local.role != "weight"} == set(report.activations)
    assert set(report.weights) == {site.key for site in plan.sites if site.local.role == "weight"}


def test_only_native_ops_no_batch_norm_and_explicit_zero_points(exported):
    _, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["BatchNormalization"] == 0 and counts["Conv"] == 3
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3 and node.input[2], node.name
    assert {o.domain: o.version for o in model.opset_import}[""] == 21


def test_weights_are_integer_initializers_with_the_trained_scales(exported):
    model, path, _ = exported
    graph = onnx.load(path).graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    scales = [held[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held]
    codes = [held[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held]
    biases = [code for code in codes if code.dtype == np.int32]
    assert all(np.abs(code).max() == 127 for code in codes if code.dtype == np.int8)
    assert len(biases) == 3 and len(codes) == 7  # those of the convolutions
    wanted = model.head.weight.detach().abs().amax(1) / 127
    assert any(s.shape == wanted.shape and np.array_equal(s, wanted.numpy()) for s in scales)
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            quantizer = dict(quantizers(model))[node.output[0]]
            low, high = min(quantizer.min_val.item(), 0.0), max(quantizer.max_val.item(), 0.0)
            assert float(held[node.input[1]]) == pytest.approx((high - low) / 255, rel=1e-6)


def test_batch_is_dynamic_and_a_batch_of_one_is_enough_to_export(exported, tmp_path):
    model, path, report = exported
    assert report.dynamic_batch
    single = fxquant.export_onnx(model, (torch.randn(1, 3, 8, 8),), tmp_path / "one.onnx")
    assert single.dynamic_batch
    for file in (path, tmp_path / "one.onnx"):
        session = onnxruntime.InferenceSession(os.fspath(file))
        name = session.get_inputs()[0].name
        for batch in (1, 2, 7):
            (out,) = session.run(None, {name: np.zeros((batch, 3, 8, 8), np.float32)})
            assert out.shape == (batch, 5)


def test_fixed_batch_on_demand(exported, tmp_path):
    model, _, _ = exported
    report = fxquant.export_onnx(model, (torch.randn(4, 3, 8, 8),), tmp_path / "f.onnx", dynamic_batch=False)
    assert not report.dynamic_batch and "fixed batch" in str(report)
    shape = onnx.load(tmp_path / "f.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [4, 3, 8, 8]


def test_no_path_of_this_machine_is_in_the_file(exported):
    _, path, _ = exported
    content = path.read_bytes()
    assert os.getcwd().encode() not in content and b"site-packages" not in content and b".py" not in content


def test_model_modes_and_state_stay_as_they_were(exported, tmp_path):
    model, _, _ = exported
    model.train()
    model.body[0].eval()
    before = snapshot(model)
    fxquant.export_onnx(model, (torch.randn(4, 3, 8, 8),), tmp_path / "again.onnx")
    assert snapshot(model) == before


def test_both_doors_place_the_same_sites_with_the_same_scales(exported):
    """The compile path, whose sites come from Dynamo, and the export path, whose come from torch.export."""
    from fxquant.passes.pipelines import export_passes
    from fxquant.prepared.deployed import quantized_graph
    from fxquant.probe.recording import record
    from fxquant.targets.profiles import get_profile

    model, _, _ = exported
    seen = {}

    def visit(key, use):
        if use.role != "weight":
            seen[key] = (use.scale.item(), use.zero_point.item())

    x = torch.randn(4, 3, 8, 8)
    record(model, (x,), None, visit)
    plan = plan_of(model)
    gm, _, frozen = quantized_graph(model, (x,), {}, None, plan, export_passes(get_profile(plan.target)))
    nodes = {n.args[5]: n for n in gm.graph.nodes if n.target is QUANTIZE_DEQUANTIZE}
    assert {label: nodes[label].args[1:3] for label in frozen.activations} == seen


def test_weight_codes_of_four_bits_in_int8_or_int4(tmp_path):
    model = calibrated(ConvNet(), torch.randn(6, 3, 8, 8), recipe="w4a8")
    x = torch.randn(4, 3, 8, 8)
    wide = fxquant.export_onnx(model, (x,), tmp_path / "w8.onnx")
    packed = fxquant.export_onnx(model, (x,), tmp_path / "w4.onnx", weight_storage="int4")
    assert packed.file_bytes < wide.file_bytes and packed.notes == ("4 weights stored as int4",)
    types = Counter(i.data_type for i in onnx.load(tmp_path / "w4.onnx").graph.initializer)
    assert types[onnx.TensorProto.INT4] >= 4
    feeds = {"x": x.numpy()}
    outputs = [
        onnxruntime.InferenceSession(os.fspath(tmp_path / name), _unoptimized()).run(None, feeds)[0]
        for name in ("w8.onnx", "w4.onnx")
    ]
    assert np.array_equal(*outputs)


def _unoptimized() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_attention_keeps_its_numbers(tmp_path, masked):
    model = calibrated(Attention(masked), torch.randn(3, 6, 16))
    x = torch.randn(2, 6, 16)
    fxquant.export_onnx(model, (x,), tmp_path / "a.onnx")
    report = fxquant.verify_onnx(model, (x,), tmp_path / "a.onnx", rounds=0)
    assert_codes_agree(report)
    kernels = {row.name: row for row in report.rows}
    assert [row.integer for row in kernels.values()].count(False) == 1  # softmax · v
    (why,) = (row.reason for row in kernels.values() if not row.integer)
    assert "comes from Softmax" in why


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return calibrated(ConvNet(), torch.randn(6, 3, 8, 8))


class TestRefusals:
    """Each bad input: its own message, no file, nothing changed."""

    x: Tensor = torch.zeros(2, 3, 8, 8)

    def refused(self, model, path, error, match, **options):
        before = snapshot(model)
        with pytest.raises(error, match=match):
            fxquant.export_onnx(model, options.pop("args", (self.x,)), path, **options)
        assert snapshot(model) == before
        if os.path.isdir(os.path.dirname(path)):
            assert not [f for f in os.listdir(os.path.dirname(path)) if f.startswith(".fxquant")]
        assert not os.path.isfile(path)

    def test_unprepared(self, tmp_path):
        self.refused(ConvNet(), tmp_path / "m.onnx", InvalidArgument, "must be given a prepared model: got ConvNet")

    def test_ranges_never_seen(self, tmp_path):
        model = fxquant.prepare(ConvNet(), (self.x + torch.randn_like(self.x),))
        match = r"must be set before export: 7 sites saw no data yet: .*calibrate"
        self.refused(model, tmp_path / "m.onnx", RangeNotSet, match)

    def test_ranges_of_zeros(self, tmp_path):
        model = fxquant.prepare(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)), (torch.randn_like(self.x),))
        fxquant.calibrate(model, [self.x])
        self.refused(model, tmp_path / "m.onnx", RangeNotSet, "2 sites saw only zeros: .*0.input.*calibrate")

    def test_ranges_of_each_batch(self, tmp_path):
        model = fxquant.prepare(ConvNet(), (self.x,), ranges=fxquant.CurrentTensor())
        match = r"scale of stem.input must not depend on the input: .*moving_average.*with a Fixed range\."
        self.refused(model, tmp_path / "m.onnx", ExportError, match)

    def test_missing_folder(self, model, tmp_path):
        self.refused(model, tmp_path / "no" / "m.onnx", InvalidArgument, "must be in an existing folder")

    def test_path_is_a_folder(self, model, tmp_path):
        self.refused(model, tmp_path, InvalidArgument, "must name a file")

    @pytest.mark.parametrize("opset", [12, 99])
    def test_opset(self, model, tmp_path, opset):
        self.refused(model, tmp_path / "m.onnx", InvalidArgument, f"from 21 to 26 .*: got {opset}", opset=opset)

    def test_storage(self, model, tmp_path):
        match = "weight_storage must be 'int8' or 'int4': got 'int2'"
        self.refused(model, tmp_path / "m.onnx", InvalidArgument, match, weight_storage="int2")

    def test_inputs_that_do_not_fit(self, model, tmp_path):
        args = (torch.zeros(2, 4, 8, 8),)
        self.refused(model, tmp_path / "m.onnx", ExportError, "must export with torch.export", args=args)

    def test_an_existing_file_survives_a_failed_write(self, model, tmp_path, monkeypatch):
        path = tmp_path / "m.onnx"
        path.write_bytes(b"old")

        def fail(*args, **kwargs):
            raise ValueError("disk full")

        monkeypatch.setattr(onnx.checker, "check_model", fail)
        with pytest.raises(ExportError, match="must be a valid ONNX model: got disk full"):
            fxquant.export_onnx(model, (self.x,), path)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.onnx"]

    def test_a_file_that_computes_another_thing(self, model, tmp_path, monkeypatch):
        """As if a pass had lost the stem's bias; the tensor after the stem is the first that is off."""
        path = tmp_path / "m.onnx"
        path.write_bytes(b"old")

        def lose_bias(program, **_):
            bias = program.graph.initializers["stem__bias__codes"]
            bias.const_value = onnx_ir.tensor(np.zeros_like(bias.const_value.numpy()), name=bias.name)
            return []

        monkeypatch.setattr("fxquant.onnx.export.pack_int4", lose_bias)
        match = r"what the evaluated graph does: got another body\.0\.conv_conv0_input: .*verify=False\) writes"
        with pytest.raises(ExportError, match=match):
            fxquant.export_onnx(model, (torch.randn_like(self.x),), path)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.onnx"]
        assert fxquant.export_onnx(model, (self.x,), path, verify=False).file_bytes == path.stat().st_size

    def test_onnx_not_installed(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
        match = r'onnxscript must be installed .*pip install "fxquant\[onnx\]"'
        self.refused(model, tmp_path / "m.onnx", MissingDependency, match)


class Chosen(nn.Module):
    """A choice of int16, for which onnxruntime has no kernel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        steps = y.round().to(torch.int16)
        return y + torch.where(steps > 0, steps, -steps)


def test_a_file_that_its_runtime_does_not_load_is_none(tmp_path):
    path, x = tmp_path / "m.onnx", torch.randn(3, 4)
    model = calibrated(Chosen(), x)
    with pytest.raises(ExportError, match=r"must load in onnxruntime .*Where.*verify=False\) writes"):
        fxquant.export_onnx(model, (x,), path)
    assert not path.exists()
    assert fxquant.export_onnx(model, (x,), path, verify=False).notes == ()
    (note,) = fxquant.export_onnx(calibrated(Chosen(), x, target="openvino"), (x,), path).notes
    assert note.startswith("not checked against the evaluated graph: ExportError: The model must load in onnxruntime")


def test_a_disabled_site_is_left_out(tmp_path):
    model = calibrated(ConvNet(), torch.randn(6, 3, 8, 8))
    dict(quantizers(model))["head.input"].enabled = False
    report = fxquant.export_onnx(model, (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx")
    assert "head.input" not in report.activations


def test_vanishing_channels_get_a_scale_that_their_bias_can_bear(tmp_path):
    """γ ≈ 0 under a bias of 1: onnxruntime's int32 bias would overflow and the optimized model be wrong."""
    model = ConvNet()
    with torch.no_grad():
        model.body[0].bn.weight[:2] = 1e-12
        model.body[0].bn.bias[:] = 1.0
    model = calibrated(model, torch.randn(6, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    report = fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert any("scale of 2 vanishing channels raised" in note for note in report.notes)
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert deployed_difference(verified) < 0.05 * verified.output_spread


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_product_whose_relu_is_read_in_float_stays_an_integer_kernel(tmp_path, bias):
    model = calibrated(
        nn.Sequential(nn.Linear(16, 32, bias=bias), nn.ReLU(), Absolute(), nn.Linear(32, 8)), torch.randn(6, 16)
    )
    x = torch.randn(4, 16)
    fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert_codes_agree(report)
    assert [row.kernel for row in report.rows] == ["MatMulIntegerToFloat"] * 2


class Absolute(nn.Module):
    def forward(self, x):
        return x.abs()


def test_a_vanishing_weight_of_one_scale_can_bear_its_bias_too(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[0].weight *= 1e-12
        model[0].bias[:] = torch.tensor([1.0, -0.5, 0.25, 2.0])
    weight = fxquant.QuantSpec(narrow=True, range=fxquant.CurrentTensor())
    fxquant.prepare(model, (x,), recipe=fxquant.Recipe(name="per tensor", weight=weight))
    fxquant.calibrate(model, [x], progress=False)
    report = fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert any("vanishing channels raised" in note for note in report.notes)
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=0)
    assert_codes_agree(verified)
    assert verified.outputs_within_code == 1.0


UNQUANTIZED = {
    "conv-transpose": lambda: nn.ConvTranspose2d(8, 8, 2, 2),
    "conv-transpose-without-bias": lambda: nn.ConvTranspose2d(8, 8, 2, 2, bias=False),
    "conv-transpose-relu": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()),
    "conv": lambda: nn.Conv2d(8, 8, 3),
    "linear": lambda: nn.Linear(6, 8),
    "linear-relu": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
}


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_a_weight_that_training_left_in_float_stays_so(tmp_path, name):
    """onnxruntime would round it by a rule of its own; what it computes is then not what training saw."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), UNQUANTIZED[name](), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 8, 8)
    fxquant.prepare(model, (x,), rules=[fxquant.Rule(path="1", operand="weight", spec=None, optional=True)])
    fxquant.calibrate(model, [x], progress=False)
    path = tmp_path / "m.onnx"
    fxquant.export_onnx(model, (x,), path)
    optimized = tmp_path / "optimized.onnx"
    runtime.session(path, optimize=True, optimized_path=optimized)
    graph = onnx.load(optimized).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    (weight,) = (p for n, p in model[1].named_parameters() if n.endswith("weight"))
    kept = [numpy_helper.to_array(tensor) for tensor in held.values() if tensor.data_type == onnx.TensorProto.FLOAT]
    assert any(np.isin(weight.detach().numpy(), value).all() for value in kept)  # maybe in another layout
    assert_codes_agree(fxquant.verify_onnx(model, (x,), path, rounds=0))


class Positions(nn.Module):
    """Rows of a table, turned, as T5's attention looks up relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(32, 4), nn.Linear(8, 8)

    def forward(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.head(x).mean() + self.table(rows).transpose(0, 1)


POSITIONS = (torch.arange(6), torch.ones(3, 8))


def positions(target: str) -> nn.Module:
    model = fxquant.prepare(Positions().eval(), POSITIONS, target=target)
    return fxquant.calibrate(model, [POSITIONS], progress=False)


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "openvino"])
def test_a_table_that_is_turned_loads_optimized(target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fxquant.export_onnx(positions(target), POSITIONS, path, dynamic_batch=False)
    assert runtime.session(path, optimize=True).get_outputs()


def test_a_file_that_only_onnxruntime_s_optimizer_refuses_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.onnx.export.move_codes_of_tables", lambda graph: 0)
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"must load in onnxruntime .* export_onnx\(…, verify=False\) writes"):
        fxquant.export_onnx(positions("onnxruntime"), POSITIONS, path, dynamic_batch=False)
    assert not path.exists()


def test_an_example_that_is_no_tuple_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"args must be a tuple of example inputs: got Tensor\. Write \(x,\)"):
        fxquant.export_onnx(positions("onnxruntime"), POSITIONS[1], tmp_path / "model.onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_layer_that_torch_export_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(), torch.ones(2, 4)
    model.add_module(name, nn.Linear(4, 3))
    fxquant.calibrate(fxquant.prepare(model.eval(), (x,)), [x], progress=False)
    with pytest.raises(ExportError, match=rf"torch\.export cannot hold a layer that is named '{name}': give it"):
        fxquant.export_onnx(model, (x,), tmp_path / "model.onnx")
