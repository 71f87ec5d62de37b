"""What every file of the checkout keeps to: its length, its docstring, no path of a machine."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.house.sources import ROOT, package_modules, python_files, statements
from tests.house.test_rooms import imported_names

MOST_LINES = 400
MEDIAN_LINES = 130
MOST_FUNCTION_LINES = 45
LONG_FUNCTIONS = 0.005  # the share of functions that may be longer
MOST_IGNORES = 40  # of types, in fxquant/ and passes/


def test_files_stay_readable() -> None:
    files = {path.resolve() for folder in ("fxquant", "passes") for path in (ROOT / folder).rglob("*")}
    sources = [path for path in sorted(files) if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}]
    long = {path.relative_to(ROOT).as_posix(): n for path in sources if (n := line_count(path)) > MOST_LINES}
    assert not long, f"files past {MOST_LINES} lines, each to become two: {long}"
    lengths = [line_count(path) for path in sources if path.suffix == ".py"]
    assert statistics.median(lengths) <= MEDIAN_LINES


def test_functions_stay_readable() -> None:
    lengths = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in package_modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    long = {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES}
    assert len(long) <= LONG_FUNCTIONS * len(lengths), f"functions past {MOST_FUNCTION_LINES} lines: {long}"


def test_every_argument_has_a_type() -> None:
    bare = []
    for name, path in package_modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            untyped = [a.arg for a in every if a and a.annotation is None and a.arg not in ("self", "cls")]
            bare += [f"{name}.{node.name}({', '.join(untyped)})"] if untyped else []
    assert not bare, f"{len(bare)} functions with arguments of no type: {bare}"


def test_few_types_are_ignored() -> None:
    counts = {
        name: count
        for name, path in package_modules().items()
        if (count := path.read_text(encoding="utf-8").count("# type: ignore"))
    }
    assert sum(counts.values()) <= MOST_IGNORES, f"{sum(counts.values())}: {counts}"


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_passes_are_never_imported_from_the_root() -> None:
    found = []
    for path in {path.resolve() for path in python_files("fxquant", "passes", "tests", "bench")}:
        for node, _ in statements(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.Import) or node.level == 0
            if absolute and any(name.split(".")[0] == "passes" for name in imported_names(node, "")):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"import fxquant.passes instead, or a second copy is loaded: {sorted(found)}"


def test_every_public_module_has_a_docstring() -> None:
    bare = []
    for name, path in package_modules().items():
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        if not private and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            bare.append(path.relative_to(ROOT).as_posix())
    assert not bare, f"modules without a docstring: {bare}"


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for _, path in package_modules().items()}
    bare = [folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").exists()]
    assert not bare, f"folders without __init__.py would be left out of the wheel: {bare}"
    assert (ROOT / "fxquant" / "passes").resolve() == ROOT / "passes", "fxquant/passes must lead to ../passes"


MACHINE_PATH = re.compile(r"(?<![\w.$})/-])/(?:home|root|Users|work|mnt|opt)/[\w.-]+|[A-Z]:\\Users\\\w")
INDEX_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.org"
    r"|--(?:extra-)?index-url[ =]*\w|--find-links"
)


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()] or pytest.skip("nothing is tracked yet")


def test_no_machine_path_and_no_index_host() -> None:
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            hit = MACHINE_PATH.search(line) or INDEX_HOST.search(line)
            if hit and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("line", ["see /home/ann/x", "path=/work/main", "'/root/.cache'", "https://pypi.org/simple"])
def test_the_path_rule_itself(line: str) -> None:
    assert MACHINE_PATH.search(line) or INDEX_HOST.search(line)


@pytest.mark.parametrize("line", ["#!/usr/bin/env bash", "https://a.org/x/work/y", "a/work/x", "$HOME/opt/x"])
def test_the_path_rule_lets_pass(line: str) -> None:
    assert not MACHINE_PATH.search(line) and not INDEX_HOST.search(line)


# What has no schema to read by: items, nested graphs, outputs, Inductor's own nodes.
BY_POSITION = {
    "fxquant.backend.inductor.lowerings",
    "fxquant.graph.arguments",
    "fxquant.graph.bodies",
    "fxquant.graph.flops",
    "fxquant.graph.inline",
    "fxquant.graph.views",
    "fxquant.passes.captured.silence_bodies",
    "fxquant.passes.captured.split_weights",
    "fxquant.passes.dynamo.dissolve_exported",
    "fxquant.report.between_passes",
    "fxquant.report.products",
}


def test_operands_are_read_by_their_names() -> None:
    """A pass may write an operand by keyword: who reads ``node.args[1]`` does not see it."""
    pattern = re.compile(r"\b(?!self)\w+\.args\[")
    found = {name for name, path in package_modules().items() if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == BY_POSITION, "use fxquant.graph.arguments, or say why the node has no schema"
