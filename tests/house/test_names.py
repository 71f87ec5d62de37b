"""What texts call by its full name is there: docstrings, comments, documents."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.sources import ROOT, python_files

NAME = re.compile(r"`(fxquant(?:\.\w+)+)`")
FILE = re.compile(r"`((?:fxquant|passes|tests|bench|docs)/[\w/.]+\.\w+)`")
# One kernel's names are no modules; what a user's process may miss.
TEXTS = [*python_files("fxquant", "passes", "bench"), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


def mentions(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """(name, first file that has it) of all that texts mention."""
    found: dict[str, str] = {}
    for path in {path.resolve(): path for path in TEXTS}.values():
        for name in pattern.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, path.relative_to(ROOT).as_posix())
    return sorted(found.items())


def resolved(name: str) -> object:
    """The module, class, function or member of a dotted name."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(value, part) and isinstance(value, ModuleType):
            importlib.import_module(".".join(parts[:index]))
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("name", "where"), mentions(NAME), ids=lambda value: str(value))
def test_a_name_is_there(name: str, where: str) -> None:
    try:
        resolved(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{where} mentions {name}: {error}")


@pytest.mark.parametrize(("name", "where"), mentions(FILE), ids=lambda value: str(value))
def test_a_file_is_there(name: str, where: str) -> None:
    assert (ROOT / name).exists(), f"{where} mentions {name}"


def test_there_is_something_to_look_for() -> None:
    assert len(mentions(NAME)) > 40 and len(mentions(FILE)) > 20
    with pytest.raises((ImportError, AttributeError)):
        resolved("fxquant.place.place")
    assert Path(ROOT, "fxquant").is_dir()
