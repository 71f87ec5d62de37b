"""The shape of the house: what may import what, what a cold import costs, how large a file may grow."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

# A unit is what stands directly in fxquant/: a module or a subpackage. It may import its own layer and those
# before. A new one joins the earliest layer that has all it imports in or before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "formats", "spec", "progress", "table"),
    ("numerics",),
    ("kernels",),
    ("ops",),
    ("rules", "profiles", "recipes", "tensor_quant"),
    ("plan", "graph", "lift", "groups", "place", "resolve", "regions"),
    ("passes",),
    ("capture",),
    ("state", "prepare", "override"),
    ("lowerings", "loops", "compiling", "gpu", "reuse", "backend", "scheduled"),
    ("recording",),
    ("calibrate", "onnx"),
    ("report",),
    ("__init__",),
    ("demo", "__main__"),
)
# Units that may import less than their layer allows.
ONLY: dict[str, set[str]] = {"kernels": {"numerics", "errors", "formats"}}
# (importer, imported): imports that stand in a function, or under TYPE_CHECKING, because they may not run at
# import time. The only way to import against the order, and the only way to a unit in LAZY_ONLY.
LAZY: dict[tuple[str, str], str] = {
    ("ops", "backend"): "the first op that Dynamo traces is told to Inductor, which a cold import may not load",
    ("ops", "kernels"): "a dispatch function reaches for a kernel when a tensor on its device comes in",
    ("report", "kernels"): "explain says which path they take",
}
LAZY_ONLY = {"kernels"}

RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
HEAVY = {"onnx", "onnxscript", "onnxruntime", "sklearn", "matplotlib", "rich", "tqdm", "hypothesis", "scipy"}
COMPILERS = {"torch._dynamo", "torch._inductor"}


@dataclass(frozen=True)
class Import:
    """One import of something in fxquant: `importer` and `target` are units."""

    importer: str
    target: str
    lazy: bool
    where: str


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def package_files() -> list[tuple[Path, str]]:
    """Every module of the package as (file, dotted name), the passes under the name they are installed by."""
    named = []
    for path in python_files("fxquant", "passes"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "passes":
            parts = ("fxquant", *parts)
        elif parts[1] == "passes":
            continue  # the same file, seen through the link
        named.append((path, ".".join(parts[:-1] if len(parts) > 2 and parts[-1] == "__init__" else parts)))
    return named


def unit_of(dotted: str, units: set[str]) -> str:
    """`fxquant.ops.qdq` -> `ops`; `fxquant` and names that `fxquant/__init__.py` defines -> `__init__`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in units else "__init__"


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below `node`, with whether it runs later than the module's own import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from walk(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), lazy)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or later)


def imported_names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """The dotted names that an import statement in `package` names, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(source: str, dotted: str, is_package: bool, units: set[str], where: str) -> list[Import]:
    package = dotted if is_package else dotted.rpartition(".")[0]
    importer = "__init__" if dotted in ("fxquant", "fxquant.__init__") else unit_of(dotted, units)
    found = []
    for node, lazy in walk(ast.parse(source)):
        for name in imported_names(node, package):
            target = unit_of(name, units)
            if name.split(".")[0] == "fxquant" and target != importer:
                found.append(Import(importer, target, lazy, f"{where}:{node.lineno}"))
    return found


def complaint(found: Import) -> str | None:
    """Why this import may not be, or None. Both units stand in a layer."""
    arrow = f"{found.where}: {found.importer} imports {found.target}"
    allowed = ONLY.get(found.importer)
    if allowed is not None and found.target not in allowed:
        return f"{arrow}: {found.importer} may import only {', '.join(sorted(allowed))}."
    upward = RANK[found.target] > RANK[found.importer]
    if not upward and found.target not in LAZY_ONLY:
        return None
    if not found.lazy:
        why = "against the order of LAYERS." if upward else "do so in a function."
        return f"{arrow} as it loads: {why}"
    if (found.importer, found.target) not in LAZY:
        return f"{arrow}: list the pair in LAZY with its reason, or turn the import round."
    return None


def house() -> tuple[set[str], list[Import]]:
    named = package_files()
    units = {name.split(".")[1] for _, name in named}
    found = []
    for path, name in named:
        where = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        found += imports_of(text, name, path.name == "__init__.py", units - {"__init__"}, where)
    return units, found


def test_every_module_has_a_layer() -> None:
    missing = sorted(house()[0] - RANK.keys())
    assert not missing, f"add {missing} to LAYERS in tests/test_house.py, each after the layers it imports"


def test_imports_run_one_way() -> None:
    _, found = house()
    known = [one for one in found if {one.importer, one.target} <= RANK.keys()]
    complaints = [why for one in known if (why := complaint(one))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_cycle_within_a_layer() -> None:
    graph: dict[str, set[str]] = {}
    for one in house()[1]:
        if not one.lazy:
            graph.setdefault(one.importer, set()).add(one.target)
    graph.pop("__init__", None)  # every import of fxquant.x loads it first, whoever asks
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        ("fxquant.ops.qdq", "from fxquant.numerics import quantize", None),
        ("fxquant.ops.qdq", "from ..spec import QuantSpec", None),
        ("fxquant.ops.qdq", "from . import library", None),
        ("fxquant.numerics", "from fxquant import ops", "against the order"),
        ("fxquant.numerics", "import fxquant.ops.qdq as q", "against the order"),
        ("fxquant.passes.base", "from ..backend import fxquant", "against the order"),
        ("fxquant.passes.base", "def f():\n    from ..backend import fxquant", "list the pair in LAZY"),
        ("fxquant.plan", "if TYPE_CHECKING:\n    from .state import Quantizer", "list the pair in LAZY"),
        ("fxquant.plan", "try:\n    from .state import Q\nexcept ImportError: pass", "against the order"),
        ("fxquant.ops.qdq", "from fxquant import kernels", "do so in a function"),
        ("fxquant.ops.qdq", "def f():\n    from fxquant.kernels import launch", None),
        ("fxquant.backend", "def f():\n    from fxquant.kernels import launch", "list the pair in LAZY"),
        ("fxquant.kernels.cuda", "from fxquant.spec import QuantSpec", "may import only errors, formats, numerics"),
        ("fxquant.kernels.cuda", "from fxquant import numerics", None),
        ("fxquant.plan", "from fxquant import prepare_all", "against the order"),  # a name of __init__
    ],
)
def test_the_rules_themselves(importer: str, source: str, expected: str | None) -> None:
    found = imports_of(source, importer, False, set(RANK) - {"__init__"}, "here")
    complaints = [why for one in found if (why := complaint(one))]
    assert [expected in why for why in complaints] == [True] if expected else not complaints, complaints


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_cold_import_costs_no_more_than_torch() -> None:
    extra = loaded_by("import torch, fxquant") - loaded_by("import torch")
    roots = {name.split(".")[0] for name in extra}
    assert not roots & HEAVY, f"`import fxquant` loads {sorted(roots & HEAVY)}: import it where it is used"
    foreign = sorted(roots - {"fxquant", "torch"} - sys.stdlib_module_names)
    assert not foreign, f"`import fxquant` loads {foreign}, which `import torch` does not"
    compilers = sorted(extra & COMPILERS)
    assert not compilers, f"`import fxquant` loads {compilers}, which is slow: import it where a model is compiled"


def test_cold_import_has_one_copy_of_the_passes() -> None:
    assert "passes" not in {name.split(".")[0] for name in loaded_by("import fxquant, fxquant.passes")}


def test_files_stay_readable() -> None:
    files = {path.resolve() for folder in ("fxquant", "passes") for path in (ROOT / folder).rglob("*")}
    sources = [path for path in sorted(files) if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}]
    long = {path.relative_to(ROOT).as_posix(): n for path in sources if (n := line_count(path)) > MAX_LINES}
    assert not long, f"files past {MAX_LINES} lines, each to become two: {long}"


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_passes_are_never_imported_from_the_root() -> None:
    found = []
    for path in {path.resolve() for path in python_files("fxquant", "passes", "tests", "bench")}:
        for node, _ in walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.Import) or node.level == 0
            if absolute and any(name.split(".")[0] == "passes" for name in imported_names(node, "")):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"import fxquant.passes instead, or a second copy is loaded: {sorted(found)}"


def test_every_public_module_has_a_docstring() -> None:
    bare = []
    for path, name in package_files():
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        if not private and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            bare.append(path.relative_to(ROOT).as_posix())
    assert not bare, f"modules without a docstring: {bare}"


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path, _ in package_files()}
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
