"""Measured seconds on disk: one machine decides alike in every process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.passes.joint import kept_times, product_times
from fxquant.passes.joint.kept_times import folder, instructions, kept, machine
from fxquant.passes.joint.product_times import never_faster


def gives(*values: float) -> Callable[[], list[float]]:
    return lambda: list(values)


def never() -> list[float]:
    raise AssertionError("it is measured again")


def test_the_first_measurement_stays() -> None:
    assert kept("a product", "cpu", gives(1.0, 2.0)) == [1.0, 2.0]
    assert kept("a product", "cpu", never) == [1.0, 2.0]
    assert kept("another", "cpu", gives(3.0)) == [3.0]
    assert len(list(folder().iterdir())) == 2, "nothing but results is left"


def test_of_two_at_once_the_first_to_end_counts() -> None:
    def slow() -> list[float]:
        kept("a product", "cpu", gives(1.0))  # another process ends meanwhile
        return [2.0]

    assert kept("a product", "cpu", slow) == [1.0]


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kept("a product", "cpu", gives(1.0))
    monkeypatch.setattr(kept_times, "machine", lambda device: "another")
    assert kept("a product", "cpu", gives(2.0)) == [2.0]


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"key": "another", "seconds": [5.0]})])
def test_what_cannot_be_read_is_measured(text: str) -> None:
    kept("a product", "cpu", gives(1.0))
    (path,) = folder().iterdir()
    path.write_text(text, encoding="utf-8")
    assert kept("a product", "cpu", gives(2.0)) == [2.0]


def test_where_nothing_can_be_written_it_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept("a product", "cpu", gives(1.0)) == [1.0]
    assert kept("a product", "cpu", gives(2.0)) == [2.0]


def test_the_home_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "fxquant" / "product_times"


@pytest.mark.parametrize("missing", [None, "no VNNI here"])
def test_instructions_say_whether_dot_products_are_there(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_times, "integer_dot_support", lambda: missing)
    monkeypatch.setattr(product_times, "integer_dot_support", lambda: missing)
    for cached in (instructions, machine, never_faster):
        cached.cache_clear()
    try:
        assert instructions().endswith("no VNNI") == bool(missing) and instructions() in machine("cpu")
        wanted = "integers are no faster on this CPU, which has no dot products of 8-bit integers (VNNI)"
        assert never_faster("cpu") == (wanted if missing else "") and never_faster("cuda:0") == ""
    finally:
        for cached in (instructions, machine, never_faster):
            cached.cache_clear()
