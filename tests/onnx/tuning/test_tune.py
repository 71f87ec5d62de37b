"""`tune_onnx` and its command, timed by a made-up clock: files of fxquant and of other tools, what cannot be tuned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import fxquant
from fxquant.__main__ import main
from fxquant.errors import ExportError, InvalidArgument, MissingDependency
from fxquant.onnx.tuning import TuneReport, files, tune_onnx
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath
from fxquant.targets.registry import TARGETS
from fxquant.targets.session import run_outputs
from tests.onnx.graphs import INT64, Graph, image
from tests.onnx.models import calibrated

Cases = Mapping[str, tuple[ModelPath, Feeds]]


@dataclasses.dataclass
class Clock:
    """Seconds by the nodes of a file: those of slow layers take 3 as integers, all others 1, in float 2."""

    slow: tuple[str, ...] = ()
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __call__(self, cases: Cases, *, rounds: int, threads: int) -> dict[str, list[float]]:
        self.asked.append((rounds, threads))
        for path, feeds in cases.values():
            run_outputs(path, feeds, optimize=False)  # every file that is timed runs
        return {key: [self._seconds(onnx.load(path))] * rounds for key, (path, _) in cases.items()}

    def _seconds(self, model: onnx.ModelProto) -> float:
        made = {node.output[0]: node for node in model.graph.node}
        seconds = 1.0
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                integer = made.get(node.input[1], node).op_type == "DequantizeLinear"
                seconds += (3 if node.name in self.slow else 1) if integer else 2
        return seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    target = TARGETS["onnxruntime"]
    assert target.runtime is not None
    runtime = dataclasses.replace(target.runtime, samples=found)
    monkeypatch.setitem(TARGETS, "onnxruntime", dataclasses.replace(target, runtime=runtime))
    return found


def foreign(folder: Path) -> Path:
    """A file as another tool writes it: pairs before and after each operator, node names of its own."""
    graph = Graph()
    x = graph.qdq(graph.input("N", 4, 6, 6))
    for name in ("stem", "wide", "same"):
        width = 8 if name == "wide" else 4
        weight = graph.weight(width, 4, 3, 3, axis=0)
        x = graph.qdq(graph.op("Relu", graph.op("Conv", x, weight, name=name, pads=[1] * 4)), 0.05, 0)
        if name == "wide":
            x = graph.qdq(graph.op("Conv", x, graph.weight(4, 8, 1, 1, axis=0), name="narrow"))
    flat = graph.op("Flatten", graph.qdq(graph.op("GlobalAveragePool", x)))
    return graph.save(folder, graph.qdq(graph.op("Gemm", flat, graph.weight(4, 3, axis=1), name="head")))


# ---------------------------------------------------------------- another tool's file


def test_a_file_of_another_tool(clock: Clock, tmp_path: Path) -> None:
    """`stem` and `same` are one class: what is slow of one is slow of both."""
    clock.slow = ("stem", "same", "head")
    found = tune_onnx(foreign(tmp_path), threads=2, rounds=4, progress=False)
    assert [(row.name, row.is_float) for row in found.rows] == [
        ("stem", True), ("wide", False), ("narrow", False), ("same", True), ("head", True)
    ]  # fmt: skip
    assert found.floats == ("stem", "same", "head") and (found.before, found.after, found.plain) == (12, 9, 11)
    row = found.rows[0]
    assert (row.op_type, row.shape, row.integer, row.plain) == ("Conv", "1x4x6x6 · 4x4x3x3", 4, 3)
    assert row.effect == 1 and row.noise == 0 and row.reason == "the file is slower without its float"
    assert found.rows[1].effect == 1 and found.rows[1].reason == "the file is slower without its integers"
    assert found.inputs == "x 1x4x6x6 (its open dimension 'N' is 1)"
    assert set(clock.asked) == {(4, 2), (8, 2)}, "twice the rounds in the end"
    assert found.rules == () and found.unknown == found.floats
    text = str(found)
    assert "before 12000.000 ms, after 9000.000 ms (1.33 times as fast; 11000.000 ms with all layers float)" in text
    assert "leave 3 of 5 layers in float" in text and "nodes_to_exclude" in text and "    'same',\n" in text


def test_nothing_to_recommend(clock: Clock, tmp_path: Path) -> None:
    path, output = foreign(tmp_path), tmp_path / "tuned.onnx"
    found = tune_onnx(path, output=output, progress=False)
    assert found.floats == () and found.before == found.after == 6 and found.plain == 11
    assert "the file as it is: 6000.000 ms (11000.000 ms with all layers float). No choice" in str(found)
    assert str(found).endswith("tuned.onnx: a copy of the file")
    assert onnx.load(output) == onnx.load(path)


def test_the_tuned_file_and_json(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock.slow = ("head",)
    path, output = foreign(tmp_path), tmp_path / "tuned.onnx"
    before = path.read_bytes()
    options = ("--rounds", "5", "--threads", "1", "--shape", "x=2x4x6x6", "--output", str(output), "--json")
    assert main(["tune", str(path), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["floats"] == ["head"] and told["output"] == str(output) and told["inputs"] == "x 2x4x6x6"
    assert [row["gain"] for row in told["rows"]] == [2 / 3] * 4 + [4 / 3]
    assert path.read_bytes() == before
    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    head = next(node for node in model.graph.node if node.name == "head")
    assert head.input[1] in [tensor.name for tensor in model.graph.initializer]
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    whole, tuned = (run_outputs(each, x, optimize=False)[0] for each in (path, output))
    clipped = np.clip(tuned, -128 * 0.05, 127 * 0.05)
    assert 0 < np.abs(whole - clipped).max() <= 0.05, "by the rounding of its input and its result"


def test_the_command_prints_what_python_does(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path)
    assert main(["tune", str(path)]) == 0
    assert capsys.readouterr().out == f"{tune_onnx(path)}\n"


def test_weights_beside_the_file(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file given and of those that are written, where they are too large for one file."""
    clock.slow = ("head",)
    path, whole, output = foreign(tmp_path), tmp_path / "whole.onnx", tmp_path / "tuned.onnx"
    tune_onnx(path, output=whole, progress=False)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    monkeypatch.setattr(files, "_EXTERNAL_BYTES", 0)
    for _ in range(2):
        assert tune_onnx(path, output=output, progress=False).floats == ("head",)
    x = {"x": np.ones((1, 4, 6, 6), np.float32)}
    assert (tmp_path / "tuned.onnx.data").stat().st_size < 50_000, "written anew"
    ours, expected = (run_outputs(each, x, optimize=False)[0] for each in (output, whole))
    np.testing.assert_array_equal(ours, expected)


def test_the_file_given_is_not_written_over(clock: Clock, tmp_path: Path) -> None:
    path = foreign(tmp_path)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match=r"output must be another file than path: got .* for both"):
        tune_onnx(path, output=tmp_path / "." / path.name, progress=False)
    assert path.read_bytes() == before


def test_an_interrupt_while_the_tuned_file_is_written_leaves_what_was_there(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, beside = foreign(tmp_path), tmp_path / "tuned.onnx", tmp_path / "tuned.onnx.data"
    output.write_bytes(b"earlier")
    beside.write_bytes(b"somebody's")
    real = onnx.save

    def save(model: onnx.ModelProto, to: Path, **options: Any) -> None:
        real(model, to, **options)
        if Path(to).name == output.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save", save)
    with pytest.raises(KeyboardInterrupt):
        tune_onnx(path, output=output, progress=False)
    assert (output.read_bytes(), beside.read_bytes()) == (b"earlier", b"somebody's")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, output.name, beside.name])


# ---------------------------------------------------------------- fxquant's own file: rules


class Net(torch.nn.Module):
    """Convolution, BatchNorm, a product of the model's own parameter, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.next, self.matrix = torch.nn.Conv2d(4, 8, 3), torch.nn.Parameter(torch.randn(8, 6))
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.next(self.stem(x))).mean((2, 3))
        return self.head(torch.relu(x @ self.matrix))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "net.onnx"
    fxquant.export_onnx(calibrated(Net(), X), (X,), path)
    return path


def names(path: Path, *ops: str) -> list[str]:
    return [node.name for node in onnx.load(path).graph.node if node.op_type in ops]


def test_rules_give_the_file_that_was_measured(clock: Clock, exported: Path, tmp_path: Path) -> None:
    """The second convolution and the model's own product float: prepare with the rules writes the nodes that ran."""
    convolutions, products = names(exported, "Conv"), names(exported, "MatMul")
    clock.slow = (convolutions[1], products[0])
    found = tune_onnx(exported, output=tmp_path / "tuned.onnx", progress=False)
    assert [row.module for row in found.rows] == ["stem.0", "next", "", "head"]
    assert found.rules == (fxquant.skip("next"), fxquant.skip("")) and not found.override and not found.unknown
    again = tmp_path / "again.onnx"
    fxquant.export_onnx(calibrated(Net(), X, rules=found.rules), (X,), again)
    both = (tmp_path / "tuned.onnx", again)
    tuned, trained = ([node.op_type for node in onnx.load(each).graph.node] for each in both)
    assert sorted(tuned) == sorted(trained)
    ours, theirs = (run_outputs(each, {"x": X.numpy()}, optimize=False)[0] for each in both)
    np.testing.assert_allclose(ours, theirs, atol=0.05)
    text = str(found)
    namespace: dict[str, Any] = {"fxquant": fxquant, "model": Net(), "args": (X,)}
    pasted = text.partition("train with\n\n")[2].partition("\n\n")[0]
    exec(pasted.partition("fxquant.prepare")[0], namespace)
    assert tuple(namespace["rules"]) == found.rules
    assert [fxquant.skip(**rule) for rule in found.to_dict()["rules"]] == list(found.rules)


def test_a_first_layer_with_its_batch_norm(clock: Clock, exported: Path) -> None:
    clock.slow = (names(exported, "Conv")[0],)
    found = tune_onnx(exported, progress=False)
    assert found.rules == (fxquant.skip("stem.0"),)
    assert "    fxquant.skip('stem.0'),\n" in str(found)


def test_where_no_layer_pays_the_float_model_is_named(clock: Clock, exported: Path) -> None:
    """Rules that leave nothing to quantize are none to train with."""
    clock.slow = tuple(names(exported, "Conv", "MatMul"))
    found = tune_onnx(exported, progress=False)
    assert len(found.floats) == len(found.rows) == 4
    assert "no layer pays as integers here: deploy the float model" in str(found) and "train with" not in str(found)


# ---------------------------------------------------------------- what cannot be tuned


def test_no_quantized_file(tmp_path: Path) -> None:
    graph = Graph()
    path = graph.save(tmp_path, graph.op("Relu", graph.input(2, 3)))
    with pytest.raises(InvalidArgument, match=r"path must be a Q/DQ file: got one without a QuantizeLinear or Deq"):
        tune_onnx(path)
    model = helper.make_model(helper.make_graph([helper.make_node("QLinearConv", [], ["y"])], "g", [], []))
    onnx.save(model, path)
    with pytest.raises(InvalidArgument, match=r"got one of QLinearConv nodes \(.*model.onnx\). Write it with fxquant"):
        tune_onnx(path)


def test_no_layer(tmp_path: Path) -> None:
    graph, x = image()
    path = graph.save(tmp_path, graph.op("Relu", x))
    with pytest.raises(InvalidArgument, match=r"path must have a Conv, .* got none \(none reads a DequantizeLinear\)"):
        tune_onnx(path)


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    assert main(["tune", str(tmp_path / "x.onnx")]) == 1
    assert "x.onnx must be an ONNX model: got" in capsys.readouterr().err
    with pytest.raises(ExportError, match="must be an ONNX model"):
        tune_onnx(tmp_path / "none.onnx")


def test_a_file_that_the_runtime_does_not_load(tmp_path: Path) -> None:
    graph, x = image()
    path = graph.save(tmp_path, graph.conv(x))
    model = onnx.load(path)
    model.graph.node[-1].attribute.append(helper.make_attribute("no_such", 1))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"must load in onnxruntime .*no_such"):
        tune_onnx(path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"x must have known sizes to be timed: got N×4×H×6. Say them with --shape x=Nx4xNx6 \(Python: shapes="),
        ({"x": (1, 4, 6)}, "shape of x must fit the file's N×4×H×6: got 1x4x6"),
        ({"x": (1, 5, 6, 6)}, "shape of x must fit the file's N×4×H×6: got 1x5x6x6"),
        ({"x": (0, 4, 6, 6)}, "shape of x must fit the file's N×4×H×6: got 0x4x6x6"),
        ({"y": (1,)}, "shapes must name inputs of the file, x: got 'y'"),
    ],
)
def test_sizes_that_are_not_known(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    graph = Graph()
    path = graph.save(tmp_path, graph.conv(graph.qdq(graph.input("N", 4, "H", 6))))
    with pytest.raises(InvalidArgument, match=message):
        tune_onnx(path, shapes=shapes)


def test_integers_are_zeros_and_feeds_are_taken(clock: Clock, tmp_path: Path) -> None:
    graph = Graph()
    rows = graph.op("Gather", graph.floats(3, 8), graph.input("N", "L", dtype=INT64, name="ids"), axis=0)
    path = graph.save(tmp_path, graph.op("MatMul", graph.qdq(rows), graph.weight(8, 4, axis=1), name="product"))
    assert tune_onnx(path, shapes={"ids": (1, 5)}).rows[0].shape == "1x5x8 · 8x4"
    assert tune_onnx(path, feeds={"ids": np.ones((2, 3), np.int64)}).inputs == "ids 2x3"
    with pytest.raises(InvalidArgument, match="feeds must name inputs of the file, ids: got 'x'"):
        tune_onnx(path, feeds={"x": np.ones(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be at least 1: got 0"),
        ({"rounds": 2}, "rounds must be at least 3, or noise cannot be told: got 2"),
        ({"margin": 0.9}, "margin must be a factor of at least 1: got 0.9"),
        ({"target": "tensorrt"}, "target must be one whose runs are timed here, 'onnxruntime', 'openvino': got"),
        ({"target": "generic"}, "target must be one whose runs are timed here"),
        ({"target": "none"}, "target must be one of 'onnxruntime'"),
        ({"output": "no/such/folder/x.onnx"}, "path must be in an existing folder"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        tune_onnx(foreign(tmp_path), **options)


def test_a_shape_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("1x3", "x=", "x=1x", "=1x3"):
        assert main(["tune", str(foreign(tmp_path)), "--shape", wrong]) == 1
        assert f"--shape must be NAME=SHAPE: got {wrong!r}. Write x=1x3x224x224." in capsys.readouterr().err


def test_a_runtime_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["openvino"]

    def missing() -> ModuleType:
        return require("no_such_package", "openvino must be installed: it is not. Run `pip install x`.")

    assert target.runtime is not None
    runtime = dataclasses.replace(target.runtime, require=missing)
    monkeypatch.setitem(TARGETS, "openvino", dataclasses.replace(target, runtime=runtime))
    with pytest.raises(MissingDependency, match="pip install x"):
        tune_onnx(foreign(tmp_path), target="openvino")


# ---------------------------------------------------------------- for real


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_in_the_runtime_itself(target: str, tmp_path: Path) -> None:
    """Whatever is faster here: each layer was timed, as integers and in float, and the report is of one piece."""
    found = tune_onnx(foreign(tmp_path), target=target, rounds=3, output=tmp_path / "tuned.onnx", progress=False)
    version = require(target).__version__.partition("-")[0]
    assert isinstance(found, TuneReport) and found.runtime == f"{target} {version}"
    assert all(row.integer > 0 and row.plain > 0 for row in found.rows)
    assert found.before > 0 and found.after > 0 and found.plain > 0
    assert bool(found.floats) == (found.after < found.before)
    onnx.checker.check_model(onnx.load(tmp_path / "tuned.onnx"), full_check=True)
