"""``results.json``: what a row says, and that a file is written whole or not at all."""

from __future__ import annotations

import json
import stat
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from fxquant.shell.demo.results import Result, replaced, write
from tests.shell.demo.made import SCHEMA, result

WRITTEN = """\
[
  {
    "net": "vit",
    "recipe": "w4a8",
    "float_acc": 0.99,
    "ptq_acc": 0.5,
    "qat_acc": 0.985,
    "onnx_acc": 0.985,
    "differing_codes": 7,
    "compared_codes": 123456,
    "integer_share": 1.0,
    "latency_ratio": 0.25,
    "cascaded_codes": 3,
    "same_class": 1.0
  }
]
"""


def test_results_have_the_schema(tmp_path: Path) -> None:
    assert [f.name for f in fields(Result)] == list(SCHEMA)
    write([result(), result("vit", "w4a8")], tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["net"], row["recipe"]) for row in rows] == [("cnn", "int8"), ("vit", "w4a8")]
    assert all({key: type(value) for key, value in row.items()} == SCHEMA for row in rows)


def test_results_are_plain_values() -> None:
    assert all(isinstance(value, str | int | float) for value in asdict(result()).values())


def test_the_text_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write([result("vit", "w4a8", ptq_acc=0.5, differing_codes=7, latency_ratio=0.25)], path)
    assert path.read_text(encoding="utf-8") == WRITTEN
    write([], path)
    assert path.read_text(encoding="utf-8") == "[]\n"


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    rows = [result(float_acc=1 / 3, latency_ratio=1e-9), result("vit", "ä", compared_codes=2**53)]
    write(rows, tmp_path / "results.json")
    assert [Result(**row) for row in json.loads((tmp_path / "results.json").read_text())] == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_results_that_cannot_be_written_leave_the_old_ones(value: float, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write([result()], path)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        write([result(), result(latency_ratio=value)], path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


# --- replacing -----------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "results.json") as temporary:
        temporary.write_text("[{")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_text("old")
    with replaced(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        assert temporary.suffix == ".png" and temporary.name.startswith("."), "for those who go by the name"
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_text("old")
    with pytest.raises(OSError, match="disk is full"), replaced(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with replaced(path) as first, replaced(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that ends last"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_took_its_file_away_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced(tmp_path / "results.json") as temporary:
        temporary.unlink()
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_everybody_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "results.json"
    write([result()], path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("left_out", SCHEMA)
def test_a_row_is_complete(left_out: str) -> None:
    given: dict[str, Any] = {name: value for name, value in asdict(result()).items() if name != left_out}
    with pytest.raises(TypeError, match=left_out):
        Result(**given)
