"""Compiled code made by other sources is never reused: the digest follows every source file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fxquant
from fxquant.support.digest import digest_of, source_digest, source_files

PACKAGE = Path(fxquant.__file__).parent
# One file of each folder, so that a folder that is left out is found, whatever its depth.
FILES = {path.parent: path.relative_to(PACKAGE) for path in source_files(PACKAGE)}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's sources, passes included, in a folder of their own."""
    where = tmp_path_factory.mktemp("sources") / "fxquant"
    for path in source_files(PACKAGE):
        target = where / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return where


def test_it_is_of_the_sources_alone(copy: Path) -> None:
    assert digest_of(copy) == source_digest() == digest_of(PACKAGE)


def test_it_meets_every_source_file() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in source_files(PACKAGE)}
    here = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    passes = {
        f"passes/{path.relative_to(PACKAGE / 'passes').as_posix()}" for path in (PACKAGE / "passes").rglob("*.py")
    }
    assert found >= here | passes and len(passes) > 20
    assert any(name.endswith(".cu") for name in found)


@pytest.mark.parametrize("name", sorted(map(Path.as_posix, FILES.values())))
def test_an_edited_file_changes_it(name: str, copy: Path) -> None:
    before, path = digest_of(copy), copy / name
    text = path.read_bytes()
    path.write_bytes(text + b"#")
    try:
        assert digest_of(copy) != before
    finally:
        path.write_bytes(text)


def test_a_renamed_file_changes_it(copy: Path) -> None:
    before, path = digest_of(copy), copy / "passes" / "captured" / "hoist_views.py"
    path.rename(path.with_name("hoist.py"))
    try:
        assert digest_of(copy) != before
    finally:
        path.with_name("hoist.py").rename(path)
