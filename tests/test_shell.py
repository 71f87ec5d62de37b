"""fxquant and python -m fxquant, by calls of main: explain, passes, lint, kernels, and how each of them ends."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.__main__ import main
from fxquant.report.between_passes import Step, steps
from fxquant.targets.registry import TARGETS
from tests.report.nets import FLAT, IMAGE, Forked, Residual


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens) + shift))


def broken() -> nn.Module:
    raise RuntimeError("the weights are not here")


def loud() -> tuple[nn.Module, tuple[Tensor]]:
    print("here I am")
    return nn.Linear(3, 2), (torch.randn(4, 3),)


class Space:
    inner = staticmethod(Residual)


@pytest.fixture(autouse=True)
def models() -> Iterator[None]:
    module: Any = types.ModuleType("shell_models")
    vars(module).update(
        Residual=Residual, Table=Table, broken=broken, space=Space, number=3, pair=lambda: (Residual(), (IMAGE,)),
        instance=Forked(), bare=lambda: (Residual(), IMAGE), nothing=lambda: None, three=(Residual(), 1, 2),
        normed=lambda: (Normed(), (torch.randn(2, 3, 6, 6),)), choosy=lambda width: nn.Linear(width, 2), loud=loud,
    )  # fmt: skip
    sys.modules["shell_models"] = module
    yield
    del sys.modules["shell_models"]


def shell(*argv: str) -> int:
    torch.manual_seed(0)
    return main(list(argv))


# ---------------------------------------------------------------- explain


def test_explain_prints_what_python_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("explain", "shell_models:Residual", "--input", "2x3x8x8") == 0
    model = fxquant.prepare(Residual(), (IMAGE,))
    assert capsys.readouterr().out == f"{fxquant.explain(model, (IMAGE,))}\n"


@pytest.mark.parametrize("name", ["pair", "Residual", "space.inner"])
def test_a_function_a_class_or_a_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if name == "pair" else ["--input", "2x3x8x8"]
    assert shell("explain", f"shell_models:{name}", *given) == 0
    out = capsys.readouterr().out
    assert out.startswith("recipe 'int8' for onnxruntime: 11 sites") and "100 % of 72.8 kFLOP" in out


def test_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--recipe", "w4a8", "--target", "openvino", "--skip", "stem", "--skip", "head", "--json")
    drawing = tmp_path / "net.svg"
    given = ("--input", "2x3x8x8", "--draw", str(drawing))
    assert shell("explain", "shell_models:Residual", *given, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["target"]) == ("w4a8", "openvino")
    assert {site["key"].split(".")[0].split("_")[0] for site in found["sites"]}.isdisjoint({"stem", "head"})
    left = {one["module"]: one["reason"] for one in found["coverage"]["products"] if not one["quantized"]}
    assert left == {name: f"Rule(path={name!r}, spec=None)" for name in ("stem", "head")}
    assert drawing.read_text(encoding="utf-8").startswith("<svg")


def test_several_inputs_and_their_types(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--input", "2x5:int64", "--input", "4")
    assert shell("explain", "shell_models:Table", *given) == 0
    assert "head.weight" in capsys.readouterr().out
    assert shell("explain", "shell_models:instance", "--input", "3x6:float64") == 1  # a float32 model
    assert "args and kwargs must run through the model" in capsys.readouterr().err


def test_inputs_given_win_over_those_that_come_along(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("explain", "shell_models:pair", "--input", "4x3x8x8", "--json") == 0
    twice = json.loads(capsys.readouterr().out)["coverage"]["flops"]
    assert shell("explain", "shell_models:pair", "--json") == 0
    assert twice == 2 * json.loads(capsys.readouterr().out)["coverage"]["flops"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "MODULE:NAME must name a module and something in it: got 'nowhere'"),
        (["no.such.place:model"], "must name a module that Python finds: got 'no.such.place'. Run from its folder"),
        (["shell_models:absent"], "got 'absent', and shell_models has no such attribute"),
        (["shell_models:space.absent"], "got 'space.absent', and shell_models has no such attribute"),
        (["shell_models:number"], "must be or return an nn.Module, or (module, args): got int"),
        (["shell_models:nothing"], "must be or return an nn.Module, or (module, args): got NoneType"),
        (["shell_models:three"], "must be or return an nn.Module, or (module, args): got tuple"),
        (["shell_models:Residual"], "must come with example inputs: got a model alone. Add --input 1x3x32x32"),
        (["shell_models:bare"], "args must be a tuple of example inputs: got Tensor"),
        (["shell_models:Residual", "--input", "2x"], "--input must be a shape, and maybe a type of float32, "),
        (["shell_models:Residual", "--input", "2x3:int7"], "got '2x3:int7'. Write 1x3x32x32 or 1x16:int64"),
        (["shell_models:Residual", "--input", "2x3x8x8", "--recipe", "int7"], "recipe must be a Recipe or one of"),
        (["shell_models:Residual", "--input", "2x3x8x8", "--recipe", "mixed"], "must come with data and a budget"),
        (["shell_models:Residual", "--input", "2x3x8x8", "--target", "abacus"], "target must be one of"),
        (["shell_models:Residual", "--input", "2x3x8x8", "--skip", "steam"], "rules must each match an operand"),
        (["shell_models:Residual", "--input", "2x3x8x8", "--draw", "a.png"], "path must end in .svg: got 'a.png'"),
    ],
)
def test_explain_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("explain", *argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1


# ---------------------------------------------------------------- errors of the user's code

LACKS = "ModuleNotFoundError: No module named 'a_package_that_is_not_here'"
SCRIPT = 'Put what runs as a script under `if __name__ == "__main__":`.'
ASKS = "def __getattr__(name):\n    raise OSError('no network')\n"
# Name → source, the rule, what was got, the place below the file, the fix.
MODULES = {
    "needs_more": (
        "import a_package_that_is_not_here\n",
        "import",
        LACKS,
        "line 1, in <module>",
        "Mend it, or install",
    ),
    "half_written": ("def f(:\n", "import", "SyntaxError: invalid syntax", "line 1", "Mend it, or install what it"),
    "a_script": ("raise SystemExit(3)\n", "import", "an end of the process, status 3", "line 1, in <module>", SCRIPT),
    "raises": ("raise ValueError('one\\ntwo')\n", "import", "ValueError: one", "line 1, in <module>", "Mend it, or"),
    "asks": (
        ASKS,
        "be there",
        "OSError: no network",
        "line 2, in __getattr__",
        "Mend what gives it.",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_does_not_import(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, rule, got, where, fix = MODULES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert shell("explain", f"{name}:model") == 1
    captured = capsys.readouterr()
    subject = f"{name}:model" if name == "asks" else name
    assert captured.err.startswith(f"{subject} must {rule}: got {got} ({path}, {where}). {fix}")
    assert captured.err.count("\n") == 1 and captured.out == ""
    with pytest.raises(fxquant.errors.InvalidArgument) as whole:
        shell("--traceback", "explain", f"{name}:model")
    assert whole.value.__cause__ is not None


@pytest.mark.parametrize("command", ["explain", "cost", "passes"])
def test_a_function_that_fails(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(command, "shell_models:broken", "--input", "1") == 1
    err = capsys.readouterr().err
    assert err.startswith("shell_models:broken must make a model: got RuntimeError: the weights are not here (")
    assert f"{Path(__file__).name}, line " in err and ", in broken). Name a function that needs no arguments" in err
    assert shell(command, "shell_models:choosy") == 1
    err = capsys.readouterr().err
    assert "1 required positional argument: 'width'. Name a function that needs no arguments" in err


def test_inputs_that_do_not_fit_are_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """torch logs a traceback of its own for it."""
    assert shell("explain", "shell_models:Residual", "--input", "2x4x8x8") == 1
    err = capfd.readouterr().err
    assert err.startswith("args and kwargs must run through the model: got RuntimeError: ") and err.count("\n") == 1


def test_a_module_is_found_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A console script has its own folder on sys.path, and not the current one."""
    source = "from torch import nn\nmake = lambda: nn.Linear(3, 2)\n"
    (tmp_path / "of_this_folder.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert shell("explain", "of_this_folder:make", "--input", "4x3") == 0
    assert "2 sites" in capsys.readouterr().out
    assert shell("explain", "of_this_folder.py:make", "--input", "4x3") == 1
    assert "got 'of_this_folder.py'. Write it without .py." in capsys.readouterr().err
    assert shell("explain", "./of_this_folder.py:make", "--input", "4x3") == 1
    assert "must name a module by its dotted name: got './of_this_folder.py'" in capsys.readouterr().err


def test_what_a_model_prints_is_no_part_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("explain", "shell_models:loud", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["sites"] and "here I am" in captured.err
    assert shell("explain", "shell_models:loud") == 0
    assert capsys.readouterr().out.startswith("here I am\n")


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "lint: interrupted\n"),
        (
            PermissionError(13, "Permission denied", "a.svg"),
            1,
            "a.svg must be readable and writable: got Permission denied.",
        ),
        (OSError("no space"), 1, "lint must be readable and writable: got no space."),
        (fxquant.errors.ExportError("a\n\nException from src/core.cpp:1:\nb"), 1, "a\nb\n"),
    ],
)
def test_how_a_command_ends(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lint(*given: Any) -> Any:
        raise error

    monkeypatch.setattr("fxquant.onnx.lint_onnx", lint)
    assert shell("lint", "a.onnx") == status
    assert message in capsys.readouterr().err


def test_a_bug_comes_through_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.onnx.lint_onnx", None)
    with pytest.raises(TypeError):
        shell("lint", "a.onnx")


def test_a_reader_that_has_gone() -> None:
    """``fxquant completion bash | head -1``: no traceback, and none as Python ends."""
    command = [sys.executable, "-m", "fxquant", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(120) == 1


# ---------------------------------------------------------------- its name


@pytest.mark.parametrize(
    ("called", "name"), [("/usr/bin/fxquant", "fxquant"), ("C:/x/fxquant-script.py", "fxquant"),
                         ("x/fxquant/__main__.py", "python -m fxquant")],
)  # fmt: skip
def test_help_has_the_name_that_it_was_called_by(
    called: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    for command in ([], ["demo"], ["tune"]):
        with pytest.raises(SystemExit) as stopped:
            shell(*command, "--help")
        assert stopped.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {' '.join([name, *command])} ")
    assert shell("kernels", "x.onnx", "--target", "generic") == 1
    assert capsys.readouterr().err.endswith(f"Check those: {name} lint x.onnx --target generic\n")


# ---------------------------------------------------------------- passes


class Normed(nn.Module):
    """A convolution with its BatchNorm, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean([2, 3]))


NORMED = ("passes", "shell_models:normed")


def test_passes_shows_each_pass_and_the_graphs_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORMED) == 0
    out = capsys.readouterr().out
    headings = [line.split(": ")[1].split(",")[0] for line in out.splitlines() if line.startswith("graph ")]
    assert headings[:2] == ["captured", "FunctionalizeActivations"] and headings[-2:] == ["HoistViews", "SinkWeights"]
    before, _, after = out.partition("InsertFakeQuantize")
    assert "fxquant.bind.default(" in before and "fake_quantize" not in before
    assert "fxquant.bind.default(" not in after and "fxquant.fake_quantize_per_channel_affine.default(" in after
    assert "conv2d = aten.conv2d.default(" in before and "float32[2, 4, 4, 4]" in before


def test_passes_stops_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORMED, "--until", "InsertFakeQuantize", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [step["name"] for step in found]
    assert names == ["captured", "FunctionalizeActivations", "DecomposeRecurrentCells", "InsertFakeQuantize"]
    assert {step["number"] for step in found} == {1} and {step["stage"] for step in found} == {"captured"}
    assert [step["graph"] is not None for step in found[1:]] == [step["rewrites"] > 0 for step in found[1:]]
    assert found[-1]["rewrites"] > 0 and found[-1]["seconds"] > 0


def test_passes_of_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORMED, "--export", "--json") == 0
    found = {step["name"]: step for step in json.loads(capsys.readouterr().out)}
    assert found["FoldBatchNorm"]["rewrites"] == 1 and "aten.batch_norm" not in found["FoldBatchNorm"]["graph"]
    assert found["Freeze"]["stage"] == found["DecomposeLinear"]["stage"] == "export"
    assert "fake_quantize" not in found["Freeze"]["graph"]
    assert "aten.linear" in found["Freeze"]["graph"] and "aten.linear" not in found["DecomposeLinear"]["graph"]


def test_a_pass_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORMED, "--until", "FoldBatchNrom") == 1
    err = capsys.readouterr().err
    assert "until must name a pass: got 'FoldBatchNrom'. They are FunctionalizeActivations, DecomposeRec" in err
    assert shell(*NORMED, "--until", "Freeze") == 1, "of an export"


def test_bodies_stand_further_in() -> None:
    x = torch.ones(2, 3, 4, 4)
    (first, *_) = steps(fxquant.prepare(Checkpointed(), (x,)), (x,), until="FunctionalizeActivations")
    assert first.graph is not None and "\n      conv2d = aten.conv2d.default(" in first.graph


def test_a_step_in_words() -> None:
    step = Step(number=2, stage="joint", name="Fold", rewrites=1, declines=("relu: it is blue",), seconds=0.0125)
    assert str(step) == "graph 2, joint: Fold, 1 rewrite, 12.5 ms\n  declined relu: it is blue"
    assert str(dataclasses.replace(step, rewrites=2, graph="  return x")).endswith("blue\n  return x")


class Checkpointed(nn.Module):
    """A checkpointed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=False)


def test_steps_leave_the_model_as_it_was() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = fxquant.prepare(Normed(), (x,))
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    steps(model, (x,))
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) or bool(value.isnan().all()) for name, value in before.items())
    with pytest.raises(fxquant.errors.InvalidArgument, match="prepare"):
        steps(Normed(), (x,))


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = fxquant.calibrate(fxquant.prepare(Forked(), (FLAT,)), [FLAT], progress=False)
    path = tmp_path_factory.mktemp("shell") / "forked.onnx"
    fxquant.export_onnx(model.eval(), (FLAT,), str(path))
    return path


def test_lint_of_a_sound_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("lint", str(file)) == 0
    out = capsys.readouterr().out
    assert "for onnxruntime: 0 findings in" in out


def test_lint_says_what_a_target_would_not_take(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("lint", str(file), "--target", "tensorrt", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "tensorrt" and found["findings"] and found["checked"] > 0
    assert shell("lint", str(file), "--target", "tensorrt") == 1
    assert found["findings"][0]["message"] in capsys.readouterr().out


def test_kernels(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("kernels", str(file)) == 0
    shown = capsys.readouterr().out
    assert shell("kernels", str(file), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert "MatMulIntegerToFloat" in shown and all(row["kernel"] in shown and row["name"] in shown for row in rows)
    assert [row["reason"] is None for row in rows] == [row["integer"] for row in rows]


FILES = [("lint",), ("tune",), *(("kernels", "--target", name) for name in ("onnxruntime", "openvino", "tensorrt"))]


@pytest.mark.parametrize("command", FILES, ids=" ".join)
def test_what_is_no_model(command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "--target" in command:
        pytest.importorskip(TARGETS[command[2]].runtime.package.module)
    (tmp_path / "text.onnx").write_text("not a model", encoding="utf-8")
    (tmp_path / "empty.onnx").touch()
    named = {"absent": "No such file or directory", "text": "", "empty": "one without a graph"}
    for name, got in named.items():
        path = tmp_path / f"{name}.onnx"
        assert shell(*command, str(path)) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(f"{path} must be an ONNX model: got {got}") and captured.out == ""
        assert captured.err.endswith("Give a file that fxquant.export_onnx, or another tool, wrote to its end.\n")
        assert captured.err.count("\n") == 1


def test_an_unknown_target(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("lint", str(file), "--target", "abacus") == 1
    assert "target must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["fly"], ["lint"], ["explain"], ["lint", "x.onnx", "--fast"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        shell(*argv)
    assert stopped.value.code == 2 and "usage: python -m fxquant" in capsys.readouterr().err
