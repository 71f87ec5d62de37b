"""The targets beside onnxruntime: what is exported for them, and what verify_onnx says about it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import ExportError, MissingDependency
from fxquant.onnx import lint_onnx
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import Recipe
from fxquant.targets import onnxruntime_rows, openvino
from fxquant.targets import session as runtime
from fxquant.targets.session import run_codes
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.graphs import Graph
from tests.onnx.models import calibrated


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, down: bool) -> None:
        super().__init__()
        self.one, self.two, self.last = conv(4, 4), conv(4, 4), nn.Conv2d(4, 4, 1)
        self.short = conv(4, 4, 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.two(F.relu(self.one(x))) + self.short(x)))


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.project(F.relu6(self.depth(F.relu6(self.expand(x))))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.deep, self.up, self.out = conv(4, 4), conv(4, 8), nn.ConvTranspose2d(8, 4, 2, 2), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enter(x))
        return self.out(torch.cat([skip, self.up(F.relu(self.deep(F.max_pool2d(skip, 2))))], 1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.down, self.up, self.last = (
            conv(4, 4),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        return self.last(h * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1))))))


class Attention(nn.Module):
    """A pre-norm block; ``scaled`` says where: in the operator, before or after the product, or by a division."""

    def __init__(self, scaled: str) -> None:
        super().__init__()
        self.scaled = scaled
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.scaled == "operator":
            return F.scaled_dot_product_attention(q, k, v)
        if self.scaled == "before":
            scores = (q * 3**-0.5) @ k.transpose(-2, -1)
        else:
            scores = q @ k.transpose(-2, -1)
            scores = scores * 3**-0.5 if self.scaled == "after" else scores / 1.7
        return torch.softmax(scores, -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        heads = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(self.attend(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Decoder(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.one, self.two = nn.ConvTranspose2d(4, 6, 2, 2), nn.ConvTranspose2d(6, 3, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(F.relu(self.norm(self.one(x)))))


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(F.relu(self.body(x)), 2)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


# Its own generator: what is drawn must not depend on what else was collected before.
DRAW = torch.Generator().manual_seed(0)
IMAGE, TOKENS = torch.randn(3, 4, 8, 8, generator=DRAW), torch.randn(3, 5, 8, generator=DRAW)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (lambda: Residual(False), IMAGE),
    "residual-with-downsample": (lambda: Residual(True), IMAGE),
    "inverted-residual": (Inverted, IMAGE),
    "unet-skip": (UNet, IMAGE),
    "squeeze-and-excitation": (Gate, IMAGE),
    **{f"attention-{s}": (lambda s=s: Attention(s), TOKENS) for s in ("operator", "before", "after", "division")},
    "mlp": (mlp, TOKENS),
    "decoder": (lambda: Decoder(False), IMAGE),
    "decoder-with-norm": (lambda: Decoder(True), IMAGE),
    "average-pool": (Pool, IMAGE),
}


def exported(name: str, target: str, folder: Path) -> tuple[nn.Module, Tensor, Path]:
    make, x = NETS[name]
    torch.manual_seed(0)
    model = calibrated(make(), x, target=target)
    path = folder / "net.onnx"
    fxquant.export_onnx(model, (x,), path)
    return model, x, path


@pytest.fixture
def plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's optimizer must not see these graphs: it takes some of them wrong."""
    built = runtime.session

    def session(*args: Any, optimize: bool, **kwargs: Any) -> Any:
        assert not optimize
        return built(*args, optimize=optimize, **kwargs)

    for module in (runtime, onnxruntime_rows):
        monkeypatch.setattr(module, "session", session)


# ---------------------------------------------------------------- TensorRT


@pytest.mark.parametrize("name", NETS)
def test_tensorrt_export_is_clean_and_training_s_codes(name: str, tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported(name, "tensorrt", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint is not None and report.lint.target == "tensorrt"
    assert report.lint, str(report.lint)
    assert_codes_agree(report)
    assert report.output_spread > 1e-5
    assert report.runtime is None and not report.rows and math.isnan(report.integer_share)


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
@pytest.mark.parametrize("target", ["generic", "openvino", "tensorrt"])
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


class Scores(nn.Module):
    """Nothing but the scores of attention and their softmax."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax((q @ k.transpose(1, 2)) * 0.3, -1)


def scores_file(target: str, folder: Path) -> Path:
    torch.manual_seed(0)
    args = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    model = fxquant.prepare(Scores(), args, target=target)
    fxquant.calibrate(model, [args], progress=False)
    fxquant.export_onnx(model, args, folder / "scores.onnx", dynamic_batch=False)
    return folder / "scores.onnx"


def shown(path: Path) -> str:
    """``result = Op(operands)`` a line; constants by their rank."""
    graph = onnx.load(path).graph
    ranks = {tensor.name: f"const{len(tensor.dims)}" for tensor in graph.initializer}
    lines = [f"{n.output[0]} = {n.op_type}({', '.join(ranks.get(i, i) for i in n.input)})" for n in graph.node]
    return "\n".join(lines) + "\n"


def test_transpose_and_scale_stand_before_the_quantizer_for_tensorrt(tmp_path: Path) -> None:
    assert_expected_inline(
        shown(scores_file("tensorrt", tmp_path)),
        """\
matmul0_rhs = QuantizeLinear(k, const0, const0)
quantize_dequantize = DequantizeLinear(matmul0_rhs, const0, const0)
matmul0_lhs = QuantizeLinear(q, const0, const0)
quantize_dequantize_1 = DequantizeLinear(matmul0_lhs, const0, const0)
transpose = Transpose(quantize_dequantize)
matmul0_rhs@transpose = QuantizeLinear(transpose, const0, const0)
quantize_dequantize_2 = DequantizeLinear(matmul0_rhs@transpose, const0, const0)
mul = Mul(quantize_dequantize_1, const0)
matmul0_lhs@mul_tensor = QuantizeLinear(mul, const0, const0)
quantize_dequantize_3 = DequantizeLinear(matmul0_lhs@mul_tensor, const0, const0)
matmul = MatMul(quantize_dequantize_3, quantize_dequantize_2)
softmax = Softmax(matmul)
""",
    )


def test_other_targets_keep_the_order_of_the_model(tmp_path: Path) -> None:
    assert_expected_inline(
        shown(scores_file("openvino", tmp_path)),
        """\
matmul0_rhs = QuantizeLinear(k, const0, const0)
quantize_dequantize = DequantizeLinear(matmul0_rhs, const0, const0)
matmul0_lhs = QuantizeLinear(q, const0, const0)
quantize_dequantize_1 = DequantizeLinear(matmul0_lhs, const0, const0)
transpose = Transpose(quantize_dequantize)
matmul = MatMul(quantize_dequantize_1, transpose)
mul = Mul(matmul, const0)
softmax = Softmax(mul)
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


def test_generic_is_checked_by_the_common_rules(tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported("decoder", "generic", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint and report.target == "generic" and report.runtime is None
    assert_codes_agree(report)


@pytest.mark.parametrize(("target", "op"), [("onnxruntime", "Sub"), ("tensorrt", "Add"), ("openvino", "Add")])
def test_a_bias_is_subtracted_for_onnxruntime_only(target: str, op: str, tmp_path: Path) -> None:
    model, _, path = exported("mlp", target, tmp_path)
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    biases = [held[node.input[1]] for node in graph.node if node.op_type == op]
    sign = -1 if op == "Sub" else 1
    assert len(biases) == 2 and {"Add", "Sub"} & {node.op_type for node in graph.node} == {op}
    np.testing.assert_array_equal(biases[0] * sign, model[0].bias.detach().numpy())


# ---------------------------------------------------------------- OpenVINO


def test_openvino_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = exported("mlp", "openvino", tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r'it is not\. Run `pip install "fxquant\[openvino\]"`'):
        fxquant.verify_onnx(model, (x,), path)


@pytest.mark.parametrize("name", NETS)
def test_openvino_runs_products_on_integers(name: str, tmp_path: Path, plain_only: None) -> None:
    pytest.importorskip("openvino")
    model, x, path = exported(name, "openvino", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    floats = {row.name: row.reason for row in report.rows if not row.integer}
    # Attention is one kernel there: its second product has float probabilities where the model calls the operator.
    assert list(floats.values()) == (["OpenVINO runs it on i8, i8, f32"] if name == "attention-operator" else [])
    products = {"Conv", "ConvTranspose", "MatMul"}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in products]
    assert len(nodes) - 1 <= len(report.rows) <= len(nodes)
    assert report.integer_share == (len(report.rows) - len(floats)) / len(report.rows)
    assert_codes_agree(report)
    assert report.optimized_output_difference < 0.01 * report.output_spread
    assert lint_onnx(path, "openvino")
    text = str(report)
    assert f"{path} in OpenVINO 20" in text and "conv/gemm/matmul nodes run on integers" in text
    assert f"in onnxruntime without optimizations, {report.differing_codes} of " in text and "latency" not in text


@pytest.mark.parametrize(("zero_point", "precision"), [(0, "u8"), (7, "f32")])
def test_openvino_rows_are_what_ran(zero_point: int, precision: str, tmp_path: Path) -> None:
    """A transposed convolution's input with another zero point than 0 is a float kernel there."""
    pytest.importorskip("openvino")
    g = Graph()
    x = g.qdq(g.input(2, 4, 6, 6), 0.05, zero_point)
    y = g.op("ConvTranspose", x, g.weight(4, 6, 3, 3, axis=1), name="up")
    path = g.save(tmp_path, g.op("Relu", y))
    (row,) = openvino.run(path, {"x": np.ones((2, 4, 6, 6), np.float32)}).rows
    assert (row.op_type, row.kernel) == ("ConvTranspose", f"Deconvolution {precision}")
    assert row.integer == (zero_point == 0) == (row.reason is None)
    assert row.integer or "OpenVINO runs it on f32" in (row.reason or "")


def test_openvino_refuses_what_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"broken\.onnx must load and run in OpenVINO"):
        openvino.run(tmp_path / "broken.onnx", {})
