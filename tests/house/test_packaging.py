"""What is installed is what stands here: sdist and wheel hold every module, nested passes too, and old names."""

from __future__ import annotations

import configparser
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house import consumer
from tests.house.sources import ROOT, package_modules

FOLDERS = ("fxquant", "passes")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the checkout, and the wheel that was built from that."""
    where = tmp_path_factory.mktemp("built")
    source = where / "source"
    for folder in FOLDERS:
        skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skipped)
    for name in FILES:
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(where), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return where


def wanted() -> set[str]:
    """Every file of the package by the path that it is installed at."""
    found = set()
    for path in package_modules().values():
        parts = path.relative_to(ROOT).parts
        found.add("/".join(("fxquant", *parts) if parts[0] == "passes" else parts))
    kernels = (ROOT / "fxquant" / "kernels" / "cuda").glob("*.cu*")
    tables = (ROOT / "fxquant" / "targets" / "costs").glob("*.json")
    return found | {"fxquant/py.typed", *(path.relative_to(ROOT).as_posix() for path in (*kernels, *tables))}


def test_the_wheel_holds_every_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted()
    assert any(name.count("/") > 2 for name in names if name.startswith("fxquant/passes/"))


def test_the_wheel_has_a_console_script(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (entry,) = [name for name in opened.namelist() if name.endswith(".dist-info/entry_points.txt")]
        points = configparser.ConfigParser()
        points.read_string(opened.read(entry).decode())
    module, _, function = points["console_scripts"]["fxquant"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_sdist_holds_every_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers()}
    assert wanted() <= names


def test_an_installed_copy_imports_its_nested_and_its_old_modules(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = built / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import fxquant.passes.captured.hoist_views as hoist, fxquant.state, fxquant.support.digest as digest
import pathlib, sys
assert pathlib.Path(hoist.__file__).is_relative_to(sys.argv[1]), hoist.__file__
assert "passes/captured/hoist_views.py" in {
    path.relative_to(pathlib.Path(sys.argv[1], "fxquant")).as_posix()
    for path in digest.source_files(pathlib.Path(sys.argv[1], "fxquant"))
}
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, str(site)]
    subprocess.run(command, check=True, cwd=built, env=environment, timeout=300)


def test_a_project_that_uses_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its types are held by `make types`, and to what is installed by .ci/package."""
    consumer.main(tmp_path / "model.onnx", "fxquant_eager")
    assert capsys.readouterr().out.startswith("loss ")
