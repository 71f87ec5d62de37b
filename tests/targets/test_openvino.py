"""OpenVINO: products on integers, as it says itself, with training's codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import fxquant
from fxquant.errors import ExportError, MissingDependency
from fxquant.onnx import lint_onnx
from fxquant.targets import openvino
from fxquant.targets.cpu import sums_saturate
from fxquant.targets.openvino_rows import kernel_rows
from fxquant.targets.session import run_codes
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.graphs import Graph
from tests.onnx.nets import EXACT, NETS, exported


def test_openvino_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = exported("mlp", "openvino", tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r'it is not\. Run `pip install "fxquant\[openvino\]"`'):
        fxquant.verify_onnx(model, (x,), path)


@pytest.mark.parametrize("name", NETS)
def test_openvino_runs_products_on_integers(name: str, tmp_path: Path, plain_only: None) -> None:
    pytest.importorskip("openvino")
    model, x, path = exported(name, "openvino", tmp_path, EXACT)
    report = fxquant.verify_onnx(model, (x,), path)
    floats = {row.name: row.reason for row in report.rows if not row.integer}
    # Attention is one kernel there: its second product has float probabilities where the model calls the operator.
    seen = ["OpenVINO runs it on i8, i8, f32"] if name == "attention-operator" else []
    # Without VNNI it leaves some more in float.
    assert list(floats.values()) == seen or sums_saturate()
    products = {"Conv", "ConvTranspose", "MatMul"}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in products]
    assert len(nodes) - 1 <= len(report.rows) <= len(nodes)
    assert report.integer_share == (len(report.rows) - len(floats)) / len(report.rows)
    assert_codes_agree(report)
    # Without VNNI products of two activations saturate, which no weight of 7 bits is in.
    saturated = sums_saturate() and name.startswith("attention")
    assert saturated or report.optimized_output_difference < 0.01 * report.output_spread
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


def test_codes_of_neighbours_come_from_runs_of_their_own(tmp_path: Path) -> None:
    """Those of 4 bits too, which no runtime hands out as they are."""
    pytest.importorskip("openvino")
    g = Graph()
    x = g.qdq(g.input(2, 4, 6, 6), 0.5, 0, name="first")
    y = g.qdq(g.op("Relu", x), 0.5, 0, ml_dtypes.uint4, name="second")
    z = g.qdq(g.op("Add", y, x), 0.25, 128, name="third")
    path = g.save(tmp_path, z)
    feeds = {"x": np.random.default_rng(0).uniform(0, 7, (2, 4, 6, 6)).astype(np.float32)}
    parts = openvino.codes(path, feeds)
    assert [{*judged} for judged, _ in parts] == [{"first"}, {"second"}, {"third"}]
    assert [{*shown} for _, shown in parts] == [{"first", "second", "third"}, {"second", "third"}, {"third"}]
    wanted = run_codes(path, feeds)
    for label, found in (pair for _, shown in parts for pair in shown.items()):
        np.testing.assert_array_equal(found, wanted[label], label)


# ---------------------------------------------------------------- its runtime graph, written by hand


class _Text(str):
    """As OpenVINO gives what it notes: a value to be cast."""

    def astype(self, kind: type) -> str:
        return kind(self)


@dataclass(frozen=True)
class Operation:
    """One operation of OpenVINO's graph, as much of it as is read; ``reads`` are the types of its inputs."""

    layer: str
    precision: str
    origins: str
    reads: tuple[str, ...]

    def get_rt_info(self) -> dict[str, _Text]:
        texts = {"layerType": self.layer, "runtimePrecision": self.precision, "originalLayersNames": self.origins}
        return {key: _Text(text) for key, text in texts.items()}

    def get_friendly_name(self) -> str:
        return f"{self.layer}_7"

    def inputs(self) -> list[Operation]:
        return [Operation(kind, "", "", ()) for kind in self.reads]

    def get_element_type(self) -> Operation:
        return self

    def get_type_name(self) -> str:
        return self.layer


FLOAT = "OpenVINO runs it on "
WEIGHT_ONLY = "weight-only: i4 codes on f32 activations, which OpenVINO may round to 8 bits as it runs"
ROWS: dict[str, tuple[Operation, tuple[str, str, str, str | None] | None]] = {
    "a product on integers": (
        Operation("FullyConnected", "u8", "first,first/DequantizationMultiply", ("u8", "i8")),
        ("first", "MatMul", "FullyConnected u8", None),
    ),
    "a product on floats": (
        Operation("MatMul", "f32", "first", ("f32", "f32")),
        ("first", "MatMul", "MatMul f32", FLOAT + "f32, f32"),
    ),
    "a weight of 4 bits beside floats": (
        Operation("FullyConnected", "i4", "first", ("f32", "i4")),
        ("first", "MatMul", "FullyConnected i4", WEIGHT_ONLY),
    ),
    "two nodes in one": (
        Operation("MatMul", "i8", "first/Fused,second", ("i8", "i8")),
        ("first, second", "MatMul, MatMul", "MatMul i8", None),
    ),
    "a name that it lost": (
        Operation("Convolution", "u8", "Conv_12", ("u8", "i8")),
        ("Convolution_7", "Convolution", "Convolution u8", None),
    ),
    "a name that only begins like one": (
        Operation("Convolution", "u8", "firstborn", ("u8", "i8")),
        ("Convolution_7", "Convolution", "Convolution u8", None),
    ),
    "attention in one kernel, with a mask": (
        Operation("Subgraph", "f32", "first,softmax,second", ("i8", "i8", "i8", "f32")),
        ("first, second", "MatMul, MatMul", "Subgraph f32", None),
    ),
    "attention in one kernel, a float value": (
        Operation("Subgraph", "f32", "first,second", ("i8", "i8", "f32")),
        ("first, second", "MatMul, MatMul", "Subgraph f32", FLOAT + "i8, i8, f32"),
    ),
    "what rescales a product": (Operation("Subgraph", "f32", "first/DequantizationMultiply", ("i32",)), None),
    "no product": (Operation("Eltwise", "u8", "first", ("u8", "u8")), None),
}


@pytest.mark.parametrize(("operation", "expected"), ROWS.values(), ids=ROWS)
def test_rows_of_a_runtime_graph(
    operation: Operation, expected: tuple[str, str, str, str | None] | None, tmp_path: Path
) -> None:
    g = Graph()
    x = g.op("MatMul", g.input(2, 8), g.floats(8, 8), name="first")
    path = g.save(tmp_path, g.op("MatMul", g.op("Relu", x, name="relu"), g.floats(8, 8), name="second"))
    rows = list(kernel_rows([operation], path))
    assert [(row.name, row.op_type, row.kernel, row.reason) for row in rows] == ([expected] if expected else [])
    assert all(row.integer is (row.reason is None) for row in rows)
