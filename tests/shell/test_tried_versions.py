"""Ranges that the doctor holds versions to are those of pyproject.toml, of the benches and of the comments."""

from __future__ import annotations

import re
import sys

import pytest

from fxquant.shell.doctor import machine, packages
from fxquant.support.require import OLDEST
from fxquant.targets.registry import TARGETS
from fxquant.targets.target import Package
from tests.house.sources import ROOT, python_files

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = [target.runtime.package for target in TARGETS.values() if target.runtime and target.runtime.package]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def extra(name: str) -> list[str]:
    """The requirements of an extra, other extras left out."""
    (found,) = re.findall(rf"^{name} = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    return [each for each in re.findall(r'"([^"]*)"', found) if not each.startswith("fxquant")]


def test_python_and_torch() -> None:
    assert f'requires-python = ">={machine.PYTHON[0]}"' in PYPROJECT
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert (named[0], named[-1]) == machine.PYTHON
    assert f'"torch>={machine.TORCH[0]}"' in PYPROJECT
    text = "".join(path.read_text(encoding="utf-8") for path in python_files("fxquant", "passes"))
    tried = {version for line in re.findall(r"tried on ([\d. and,]+)", text) for version in re.findall(r"2\.\d+", line)}
    assert max(tried, key=numbers) == machine.TORCH[1]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.module)
def test_runtimes(package: Package) -> None:
    name = package.module.replace("_", "-")
    assert any(each.startswith(f"{name}>={package.oldest}") for each in extra(package.extra))
    assert numbers(package.oldest) <= numbers(package.newest)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.module)
def test_the_newest_was_tried(package: Package) -> None:
    """In the tests, or by make runtimes."""
    sources = [ROOT / "constraints.txt", *sorted((ROOT / "bench").rglob("*.py"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    tried = re.findall(rf"\b{package.module}==([\d.]+)", text)
    assert tried and max(map(numbers, tried)) == numbers(package.newest)


def test_the_onnx_side() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name, newest in (("onnx", packages.ONNX_NEWEST), ("onnxscript", packages.ONNXSCRIPT_NEWEST)):
        (pinned,) = re.findall(rf"^{name}==([\d.]+)", text, re.MULTILINE)
        assert numbers(pinned) <= numbers(newest)


def test_the_oldest_of_the_onnx_side() -> None:
    """In the extra, in the message, and in what OLDEST=1 .ci/package installs, which is what was tried."""
    given = dict(each.split(">=") for each in extra("onnx"))
    assert {name.replace("-", "_"): version for name, version in given.items()}.items() >= OLDEST.items()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE))
    assert given.keys() == pinned.keys()
    for name, oldest in given.items():
        assert f"{pinned[name]}.".startswith(f"{oldest}."), name


def test_extras_are_those_for_users() -> None:
    (section,) = re.findall(r"\[project.optional-dependencies\]\n(.*?)\n\n", PYPROJECT, re.DOTALL)
    names = [line.split(" = ")[0] for line in section.splitlines()]
    runtimes = {package.extra for package in PACKAGES}
    assert [each.name for each in packages.EXTRAS] == [n for n in names if n not in runtimes | {"test", "docs", "dev"}]
    for each in packages.EXTRAS:
        assert tuple(re.split(r"[>=<;]", name)[0] for name in extra(each.name)) == each.packages


def test_this_python_is_within() -> None:
    assert numbers(machine.PYTHON[0]) <= sys.version_info[:2]
