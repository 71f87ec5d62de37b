"""The whole run of the demo, against an fxquant that does nothing, and once for real."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
import fxquant.report
import fxquant.shell.demo
from fxquant.errors import InvalidArgument, MissingDependency
from fxquant.shell.demo import job
from fxquant.shell.demo.nets import NETS
from fxquant.shell.demo.panels import processors
from fxquant.shell.demo.results import write
from tests.shell.demo.made import SCHEMA, Reader, few_digits, result

# --- the command line ----------------------------------------------------------------------------------


def test_what_is_run_unless_told_otherwise() -> None:
    options = fxquant.shell.demo.parser().parse_args([])
    assert vars(options) == {
        "out": Path("build/demo"), "seed": 0, "nets": ["cnn", "vit"], "recipes": ["int8", "w4a8"],
        "jobs": processors(), "quick": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nets", "resnet"], "argument --nets: invalid choice: 'resnet'"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--nets"], "argument --nets: expected at least one argument"),
    ],
)
def test_what_the_command_line_refuses(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        fxquant.shell.demo.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# --- the run -------------------------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch: Any) -> list[str]:
    """fxquant's API replaced by one that does nothing but keep a list of what was called."""
    calls: list[str] = []

    def note(name: str, gives: Any = None) -> Any:
        def call(model: nn.Module, *rest: Any, **named: Any) -> Any:
            calls.append(name)
            return model if gives is None else gives

        return call

    report = SimpleNamespace(
        integer_share=1.0, differing_codes=0, compared_codes=99, latency_ratio=0.5, cascaded_codes=0
    )
    for name in ("prepare", "calibrate", "freeze_batch_norm", "freeze_ranges"):
        monkeypatch.setattr(fxquant, name, note(name), raising=False)
    monkeypatch.setattr(fxquant, "export_onnx", note("export_onnx", "exported"), raising=False)
    monkeypatch.setattr(fxquant, "verify_onnx", note("verify_onnx", report), raising=False)
    monkeypatch.setattr(fxquant.report, "html", note("html"), raising=False)
    monkeypatch.setattr(fxquant.report, "sqnr", note("sqnr", {"a.quantizers.weight": 40.0}), raising=False)
    monkeypatch.setattr(job, "compiled", lambda model, backend: (calls.append(backend), model)[1])
    monkeypatch.setattr(job, "run_onnx", lambda path, images: torch.eye(10)[torch.zeros(len(images)).long()])
    return calls


def test_stages_come_in_order_and_everything_is_written(faked: list[str], tmp_path: Path, capsys: Any) -> None:
    assert fxquant.shell.demo.main(["--quick", "--out", str(tmp_path), "--nets", "cnn", "--recipes", "int8"]) == 0
    assert faked == [
        "prepare", "calibrate", "fxquant_eager", "fxquant", "freeze_batch_norm", "freeze_ranges",
        "fxquant_eager", "export_onnx", "verify_onnx", "html", "sqnr",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curves.png", "cnn-int8.txt"}
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {key: type(value) for key, value in row.items()} == SCHEMA
    assert str(tmp_path) in capsys.readouterr().out


def test_each_net_and_recipe_runs_once_in_the_order_given(
    faked: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    drawn: list[list[tuple[str, list[str]]]] = []
    ours = few_digits(torch.arange(64) % 10, torch.arange(10))
    monkeypatch.setattr("fxquant.shell.demo.data.load", lambda seed: ours)
    monkeypatch.setattr(
        "fxquant.shell.demo.plot.draw",
        lambda panels, path: drawn.append([(p.trained.net, [run.result.recipe for run in p.runs]) for p in panels]),
    )
    for net in ("cnn", "vit"):
        monkeypatch.setitem(NETS, net, Reader)
    arguments = ["--nets", "vit", "cnn", "vit", "--recipes", "w4a8", "w4a8", "--jobs", "1"]
    assert fxquant.shell.demo.main(["--quick", "--out", str(tmp_path), *arguments]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["net"], row["recipe"]) for row in rows] == [("vit", "w4a8"), ("cnn", "w4a8")]
    assert drawn == [[("vit", ["w4a8"]), ("cnn", ["w4a8"])]]
    last = capsys.readouterr().out.splitlines()[-1]
    files = "vit-w4a8.onnx, vit-w4a8.html, cnn-w4a8.onnx, cnn-w4a8.html"
    assert last == f"Written to {tmp_path}: results.json, curves.png, {files}"


def test_a_missing_package_is_named_before_anything_is_done(
    faked: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def missing() -> None:
        raise MissingDependency("onnx is not there.")

    write([result()], tmp_path / "results.json")
    monkeypatch.setattr("fxquant.shell.demo.extras.require_all", missing)
    assert fxquant.shell.demo.main(["--quick", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fxquant demo: onnx is not there.\n"
    assert not faked and (tmp_path / "results.json").exists(), "an earlier run's files are all there still"


def test_the_float_net_is_left_alone_and_numbers_repeat(faked: list[str], tmp_path: Path) -> None:
    rows = []
    for folder in ("a", "b"):
        assert fxquant.shell.demo.main(["--quick", "--out", str(tmp_path / folder), "--nets", "vit"]) == 0
        rows.append(json.loads((tmp_path / folder / "results.json").read_text()))
    assert rows[0] == rows[1]
    assert rows[0][0]["qat_acc"] == rows[0][1]["qat_acc"]  # both fakes start from float


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (InvalidArgument("no"), 1)])
def test_a_run_cut_short_leaves_no_results(
    faked: list[str], raised: BaseException, code: int, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise raised

    write([result()], tmp_path / "results.json")  # of an earlier run, whose files this one replaces
    monkeypatch.setattr(fxquant, "export_onnx", stop, raising=False)
    assert fxquant.shell.demo.main(["--quick", "--out", str(tmp_path), "--nets", "cnn"]) == code
    assert not (tmp_path / "results.json").exists()
    assert "fxquant demo:" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_end_to_end(tmp_path: Path) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--nets", "cnn", "--recipes", "int8"]
    assert fxquant.shell.demo.main(arguments) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {key: type(value) for key, value in row.items()} == SCHEMA
    assert row["compared_codes"] > 0 and 0 < row["integer_share"] <= 1
    assert row["onnx_acc"] == pytest.approx(row["qat_acc"], abs=0.01)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"curves.png", "cnn-int8.onnx", "cnn-int8.txt", "cnn-int8.html"} <= names
