"""The README's examples run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for example in examples:  # the second goes on from the first
        exec(compile(example, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "recipe 'int8' for onnxruntime: " in shown
    assert "2 of 2 conv/gemm/matmul nodes run on integers (100.0 %)" in shown
    assert (tmp_path / "model.onnx").is_file()


def test_every_name_it_mentions_exists() -> None:
    import fxquant
    import fxquant.report

    for name in set(re.findall(r"fxquant\.([a-zA-Z_]+(?:\.[a-z_]+)?)\(", README.read_text(encoding="utf-8"))):
        target = fxquant
        for part in name.split("."):
            target = getattr(target, part)
        assert callable(target), name
