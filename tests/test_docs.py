"""The documents name what there is: operators, and the tests that they point to; examples that show what they print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fxquant import ops, tensor_quant

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
MODELOPT = TEXT.split("## ModelOpt's tensor_quant")[1].split("\n## ")[0]
POINTER = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
POINTERS = POINTER.findall(TEXT)
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
POINTED = sorted({(name, *pointer) for name, text in DOCUMENTS.items() for pointer in POINTER.findall(text)})


@pytest.mark.parametrize("name", [*ops.__all__, *tensor_quant.__all__])
def test_every_public_operator_is_described(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+)`", MODELOPT))))
def test_every_name_of_modelopt_s_that_is_described_is_there(name: str) -> None:
    assert name in tensor_quant.__all__


@pytest.mark.parametrize(("document", "path", "name"), POINTED, ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_what_a_document_points_to_is_there(document: str, path: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_deviations_to_look_for() -> None:
    section = TEXT.split("## Where we differ")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) - 2 == len(POINTERS)


def test_the_placement_guide_s_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
    names = {"__name__": "placement"}
    for example in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(example, "placement.md", "exec"), names)
    shown = capsys.readouterr().out
    (printed,) = re.findall(r"```\n(recipe .*?)```", guide, re.DOTALL)
    assert printed.splitlines()[:2] == shown.splitlines()[:2]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_tensorrt_guide_s_example_prints_what_it_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (shown,) = re.findall(r"```\n(model.onnx in TensorRT .*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "tensorrt.md", "exec"), {"__name__": "tensorrt"})
    assert capsys.readouterr().out.startswith(shown)


def test_the_cost_guide_s_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    names = {"__name__": "cost"}
    for example in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(example, "cost.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.startswith("one training step, recipe 'int8' for onnxruntime, batch 4\n")
    assert "*batch" in shown and "bytes saved" in shown


def test_every_claim_of_equality_names_its_test() -> None:
    rows = [line for line in DOCUMENTS["numerics.md"].splitlines() if line.startswith("| ") and "---" not in line]
    claims = [row for row in rows if not row.endswith("| test |")]
    assert len(claims) > 20 and all(POINTER.search(row) for row in claims)
