"""docs/shell.md: every command, every field of JSON, and the doctor's lines as they are."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.__main__ import main
from fxquant.shell import doctor
from fxquant.shell.completion import commands
from fxquant.shell.parser import parser
from tests.house.sources import ROOT

TEXT = (ROOT / "docs" / "shell.md").read_text(encoding="utf-8")
COMMANDS = {each.name: each for each in commands(parser("0"))[1:]}
# Command → what stands at the beginning of its row.
FIELDS = dict(re.findall(r"^\| `(\w+)` \| ((?:a list; for each \w+ )?`.*) \|$", TEXT.split("## JSON")[1], re.MULTILINE))
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Command → arguments that it prints a report for."""
    torch.manual_seed(0)

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (X,)

    module: Any = types.ModuleType("models_of_the_shell_doc")
    module.make = make
    sys.modules[module.__name__] = module
    model = fxquant.calibrate(fxquant.prepare(*make()), [X], progress=False)
    path = str(tmp_path_factory.mktemp("shell") / "model.onnx")
    fxquant.export_onnx(model.eval(), (X,), path)
    named = {name: [f"{module.__name__}:make"] for name in ("explain", "cost", "passes")}
    yield {**named, "lint": [path], "kernels": [path], "tune": [path, "--rounds", "3"], "doctor": ["--quick"]}
    del sys.modules[module.__name__]


def test_every_command_has_a_line() -> None:
    assert re.findall(r"^\| `fxquant (\w+)", TEXT, re.MULTILINE) == list(COMMANDS)
    for name, rest in re.findall(r"`fxquant ([a-z]+)([^`]*)`", TEXT):
        known = {option for each in COMMANDS[name].options for option in each.names}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, (name, rest)


def test_what_prints_a_report_has_json() -> None:
    with_json = [name for name, each in COMMANDS.items() if any("--json" in option.names for option in each.options)]
    assert sorted(with_json) == sorted(FIELDS)
    assert set(COMMANDS) - set(with_json) == {"demo", "costs", "completion"}, "results.json, a table, a script"


@pytest.mark.parametrize("command", sorted(FIELDS))
def test_the_fields_are_those_printed(
    command: str, given: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *given[command], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    row = FIELDS[command].split(": those of ")[0]
    first = told[0] if row.startswith("a list") else told
    listed = re.findall(r"`(\w+)`", row)
    inner = list(told["findings"][0]) if command == "doctor" else []
    assert listed == [*first, *inner]
    assert main([command, *given[command]]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() and not shown.startswith(("{", "[")), "words without --json"


def test_the_doctor_s_lines() -> None:
    (shown,) = re.findall(r"```\n(fxquant .*?)```", TEXT, re.DOTALL)
    heading, *lines, verdict = shown.splitlines()
    assert heading.startswith(f"fxquant {fxquant.__version__} on ") and verdict.startswith("Training works here. ")
    names = [each.name for each in doctor.checks(quick=False)]
    assert [line.split()[0] for line in lines] == names
    statuses = re.findall(r"^\| `([a-z ]+)` \| [a-z]", TEXT.split("| status |")[1].split("\n\n")[0], re.MULTILINE)
    assert statuses == ["ok", "note", "missing", "left out", "broken"]
    assert {line[13:22].strip() for line in lines} <= set(statuses)


def test_the_error_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = re.findall(r"\$ fxquant explain models:make\n(.*?)```", TEXT, re.DOTALL)
    source = "\n" * 5 + "def make():\n    open('weights.pt')\n"
    (tmp_path / "models.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    assert main(["explain", "models:make"]) == 1
    assert capsys.readouterr().err.replace(f"{tmp_path}/", "") == " ".join(shown.split()) + "\n"
    monkeypatch.delitem(sys.modules, "models")
