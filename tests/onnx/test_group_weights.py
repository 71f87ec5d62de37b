"""Weights with a scale per group in the exported file: codes and scales by hand, and what runtimes make of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fxquant
from fxquant.onnx import ExportReport, VerifyReport, lint_onnx
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT4_WEIGHT_ONLY, Recipe
from fxquant.targets.session import run_outputs, session
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.models import calibrated

GROUPS = QuantSpec(bits=4, narrow=True, axis=0, group_size=16, range=CurrentTensor())
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[0, 1, 2], [6, 5, 4]])


def weight_only(**fields: Any) -> Recipe:
    return Recipe(name="mine", activation=None, weight=dataclasses.replace(GROUPS, **fields))


class Net(nn.Module):
    """A linear with a bias, and a product with a parameter ``[K, N]`` of an odd number of columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 32), nn.Parameter(torch.randn(32, 7) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down


class Tied(nn.Module):
    """A table that is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 32), nn.Linear(32, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


@dataclasses.dataclass
class Exported:
    """A model in a file, and what was found of it."""

    model: nn.Module
    path: Path
    report: ExportReport
    inputs: tuple[Tensor, ...]

    def verify(self) -> VerifyReport:
        return fxquant.verify_onnx(self.model, self.inputs, self.path, rounds=0)

    @property
    def blocks(self) -> list[tuple[dict[str, int], list[np.ndarray]]]:
        """Attributes, and codes, scale and zero point, of each DequantizeLinear of a weight."""
        model = onnx.load(self.path)
        held = {t.name: t for t in model.graph.initializer}
        nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held]
        return [
            ({a.name: a.i for a in n.attribute}, [numpy_helper.to_array(held[name]) for name in n.input]) for n in nodes
        ]

    @property
    def types(self) -> set[str]:
        model = onnx.load(self.path)
        codes = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        return {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if t.name in codes}


def exported(folder: Path, model: nn.Module, *inputs: Tensor, **options: Any) -> Exported:
    """Prepared, trained for a step, written."""
    torch._dynamo.reset()
    fxquant.prepare(model, inputs, **options)
    step = torch.compile(model, backend="fxquant_eager")
    step(*inputs).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    path = folder / "model.onnx"
    report = fxquant.export_onnx(model.eval(), inputs, path)
    return Exported(model, path, report, inputs)


def by_hand(rows: Tensor, size: int, bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of groups of consecutive values of each row, in float64 after float32 scales."""
    groups = rows.detach().reshape(len(rows), -1, size)
    scale = groups.abs().amax(2) / (2 ** (bits - 1) - 1)
    codes = torch.round(groups.double() / scale.double()[..., None]).reshape(rows.shape)
    return codes.numpy(), scale.numpy()


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (3, 16), (2, 8)])
def test_codes_scales_and_layout(bits: int, size: int, tmp_path: Path) -> None:
    done = exported(tmp_path, Net(), X, recipe=weight_only(bits=bits, group_size=size))
    found = sorted(done.blocks, key=lambda block: block[1][0].shape[0], reverse=True)
    weights = (done.model.up.weight, done.model.down.t())
    assert len(found) == 2 and done.types == {"INT4"} and done.report.opset == 21
    for (attributes, (codes, scale, point)), weight in zip(found, weights, strict=True):
        wanted, scales = by_hand(weight, size, bits)
        assert attributes == {"axis": 0, "block_size": size} and scale.shape == (weight.shape[1] // size, len(weight))
        assert np.array_equal(codes.astype(np.float64), wanted.T)
        assert np.array_equal(scale, scales.T) and point.shape == scale.shape and not point.astype(np.int8).any()
    assert done.report.notes == ("2 weights stored as int4",)


def test_a_table_in_groups_of_its_rows(tmp_path: Path) -> None:
    done = exported(tmp_path, Tied(), TOKENS, recipe=INT4_WEIGHT_ONLY)
    table = next(found for found in done.blocks if found[0]["axis"] == 1)
    codes, scales = by_hand(done.model.table.weight, 32)
    assert np.array_equal(table[1][0].astype(np.float64), codes) and np.array_equal(table[1][1], scales)
    assert len(done.report.weights) == 1 and len(done.blocks) == 2  # one for each layout
    report = done.verify()
    assert report.max_output_difference < 1e-5 * report.output_spread


def test_the_reference_evaluator_computes_what_training_does(tmp_path: Path) -> None:
    done = exported(tmp_path, Net(), X, recipe=weight_only(), target="generic")
    (found,) = ReferenceEvaluator(str(done.path)).run(None, {"x": X.numpy()})
    trained = torch.compile(done.model, backend="fxquant_eager")(X).detach().numpy()
    np.testing.assert_allclose(found, trained, rtol=1e-5, atol=1e-5)


def test_int4_is_an_eighth_of_float32(tmp_path: Path) -> None:
    model = nn.Linear(256, 256, bias=False)
    done = exported(tmp_path, model, torch.randn(2, 256), recipe=weight_only(group_size=64))
    scales = 256 * 4 * (4 + 0.5)  # with zero points
    assert done.report.file_bytes < done.report.float_bytes / 8 + scales + 3000


@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (8, "INT8"), (12, "INT16")])
def test_wider_codes_where_the_target_takes_them(bits: int, kind: str, tmp_path: Path) -> None:
    done = exported(tmp_path, Net(), X, recipe=weight_only(bits=bits), target="generic")
    report = done.verify()
    assert done.types == {kind} and report.lint and report.max_output_difference < 1e-5 * report.output_spread


def test_a_batch_norm_behind_groups_stays_and_agrees(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
    done = exported(tmp_path, model, X, recipe=weight_only())
    assert "the weight before it has a scale per group: it is not folded into" in done.report.notes[0]
    report = done.verify()
    assert report.max_output_difference < 1e-5 * report.output_spread


# ---------------------------------------------------------------- onnxruntime


def test_weight_only_becomes_matmulnbits(tmp_path: Path) -> None:
    done = exported(tmp_path, Net(), X, recipe=INT4_WEIGHT_ONLY)
    report = done.verify()
    assert [row.kernel for row in report.rows] == ["MatMulNBits", "MatMulNBits"]
    assert all((row.reason or "").startswith("weight-only: ") for row in report.rows)
    assert report.compared_codes == 0 and report.max_output_difference < 1e-5 * report.output_spread
    assert lint_onnx(done.path, "onnxruntime")


def test_matmulnbits_is_exact_at_accuracy_level_1_and_rounds_by_default(tmp_path: Path) -> None:
    """The default, 4, rounds activations to 8 bits in groups of the weight's: some hundredths of the result."""
    done = exported(tmp_path, Net(), X, recipe=INT4_WEIGHT_ONLY)
    feeds = {"x": X.numpy()}
    (exact,) = run_outputs(done.path, feeds, optimize=False)
    (default,) = run_outputs(done.path, feeds, optimize=True)
    for level in "0123":
        config = {"session.qdq_matmulnbits_accuracy_level": level}
        (found,) = session(done.path, optimize=True, config=config).run(None, feeds)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    config = {"session.qdq_matmulnbits_accuracy_level": "4"}
    (rounded,) = session(done.path, optimize=True, config=config).run(None, feeds)
    assert np.array_equal(rounded, default)
    assert np.abs(default - exact).max() < 0.1 * exact.std()


@pytest.mark.parametrize(("size", "kernel"), [(8, "MatMul"), (16, "MatMulNBits"), (32, "MatMulNBits")])
def test_explain_forecasts_the_kernel(size: int, kernel: str, tmp_path: Path) -> None:
    done = exported(tmp_path, Net(), X, recipe=weight_only(group_size=size))
    expected = {row.kernels for row in fxquant.explain(done.model).rows}
    assert {row.kernel for row in done.verify().rows} == {kernel}
    assert expected == {(kernel if kernel == "MatMulNBits" else f"float: MatMulNBits has no groups of {size}",)}


def test_beside_quantized_activations(tmp_path: Path) -> None:
    """onnxruntime multiplies in float then; int8 blocks would fail at run time, so the codes are int4 always."""
    done = exported(tmp_path, Net(), X, recipe=Recipe(name="w4a8 in groups", weight=GROUPS))
    report = done.verify()
    assert_codes_agree(report)
    assert {row.kernel for row in report.rows} == {"MatMul"} and done.types == {"INT4"}
    assert all("holds int4 codes" in (row.reason or "") for row in report.rows)
    assert report.optimized_output_difference < 0.05 * report.output_spread


def test_some_weights_of_int8_in_groups(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    rules = [fxquant.Rule(path="2", operand="weight", spec=GROUPS)]
    calibrated(model, X, rules=rules)
    path = tmp_path / "model.onnx"
    fxquant.export_onnx(model, (X,), path)
    report = fxquant.verify_onnx(model, (X,), path, rounds=0)
    assert_codes_agree(report)
    assert [row.integer for row in report.rows] == [True, False]


# ---------------------------------------------------------------- other targets


@pytest.mark.parametrize("quantized", [False, True])
def test_openvino_multiplies_floats_by_int4(quantized: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    recipe = Recipe(name="w4a8 in groups", weight=GROUPS) if quantized else weight_only()
    done = exported(tmp_path, Net(), X, recipe=recipe, target="openvino")
    report = done.verify()
    assert {row.kernel for row in report.rows} == {"FullyConnected i4"} and report.integer_share == 0
    assert all((row.reason or "").startswith("weight-only: i4 codes on f32 activations") for row in report.rows)
    assert report.max_output_difference < 0.05 * report.output_spread
    assert report.optimized_output_difference < 0.02 * report.output_spread
    assert lint_onnx(done.path, "openvino")


def test_openvino_takes_int8_groups(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    done = exported(tmp_path, Net(), X, recipe=weight_only(bits=8), target="openvino")
    report = done.verify()
    assert done.types == {"INT8"} and {row.kernel for row in report.rows} == {"FullyConnected i8"}
    assert report.optimized_output_difference < 0.05 * report.output_spread  # its dynamic rounding of activations


def test_the_form_of_tensorrt(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    done = exported(tmp_path, model, torch.randn(2, 128), recipe=weight_only(group_size=64), target="tensorrt")
    report = done.verify()
    assert done.types == {"INT4"} and report.lint and not report.lint.findings
    assert report.max_output_difference < 1e-5 * report.output_spread
