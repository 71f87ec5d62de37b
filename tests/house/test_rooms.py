"""The shape of the house: which room may import which, what stands at the root, what a cold import costs."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.house.sources import ROOT, package_modules, statements

# A room is what stands directly in fxquant/: a folder, or one of the few modules there. It may import itself and the
# rooms before it, in functions and under TYPE_CHECKING too. A new one stands as early as what it imports lets it.
ROOMS = (
    "errors",
    "support",
    "numerics",
    "kernels",
    "ops",
    "tensor_quant",
    "spec",
    "targets",
    "graph",
    "plan",
    "passes",
    "capture",
    "prepared",
    "backend",
    "probe",
    "training",
    "search",
    "ptq",
    "onnx",
    "report",
    "formerly",
    "__init__",
    "shell",
    "__main__",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}
MODULES = {"errors", "__init__", "__main__"}  # that may stand at the root beside the folders
MOST_ENTRIES = 22  # folders and modules there, besides __init__, __main__ and py.typed
# Rooms that are loaded when a function first needs them, and never as a module is imported.
LAZY_ONLY = {"kernels": "a dispatch function reaches for a kernel when a tensor on its device comes in"}

HEAVY = {"onnx", "onnxscript", "onnxruntime", "sklearn", "matplotlib", "rich", "tqdm", "hypothesis", "scipy"}
COMPILERS = {"torch._dynamo", "torch._inductor"}


@dataclass(frozen=True)
class Import:
    """One import of something in fxquant, by the dotted names of both modules."""

    importer: str
    target: str
    lazy: bool
    where: str


def room_of(module: str) -> str:
    """``fxquant.ops.qdq`` → ``ops``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """The dotted names that an import statement in ``package`` names, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(source: str, module: str, is_package: bool, known: set[str], where: str) -> Iterator[Import]:
    """The imports of fxquant in a module's source; a name that is no module belongs to the package it is read from."""
    package = module if is_package else module.rpartition(".")[0]
    for node, lazy in statements(ast.parse(source)):
        for name in imported_names(node, package):
            if name.split(".")[0] != "fxquant":
                continue
            while name not in known:
                name = name.rpartition(".")[0]
            if name != module:
                yield Import(module, name, lazy, f"{where}:{node.lineno}")


def complaint(found: Import) -> str | None:
    """Why this import may not be, or None."""
    importer, target = room_of(found.importer), room_of(found.target)
    arrow = f"{found.where}: {found.importer} imports {found.target}"
    if target == "__init__" and importer not in ("shell", "__main__"):
        return f"{arrow}: name the module that holds it."
    if RANK[target] > RANK[importer]:
        return f"{arrow}, against the order of ROOMS."
    if target in LAZY_ONLY and importer != target and not found.lazy:
        return f"{arrow} as it loads: do so in a function, since {LAZY_ONLY[target]}."
    return None


def house() -> list[Import]:
    """All imports within the package."""
    modules = package_modules()
    found: list[Import] = []
    for name, path in modules.items():
        where = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        found += imports_of(text, name, path.name == "__init__.py", set(modules), where)
    return found


def test_every_room_is_known_and_few_stand_at_the_root() -> None:
    entries = {path.stem for path in (ROOT / "fxquant").iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert entries == set(ROOMS), "add a new room to ROOMS, after those that it imports"
    loose = {path.stem for path in (ROOT / "fxquant").glob("*.py")}
    assert loose == MODULES, "a module stands in a room"
    assert len(entries - {"__init__", "__main__"}) <= MOST_ENTRIES


def test_imports_run_one_way() -> None:
    complaints = [why for one in house() if (why := complaint(one))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_module_is_in_a_cycle() -> None:
    """Imports in functions and under TYPE_CHECKING counted."""
    graph: dict[str, set[str]] = {}
    for one in house():
        graph.setdefault(one.importer, set()).add(one.target)
    graph.pop("fxquant", None)  # every import of fxquant.x loads it first, whoever asks
    graphlib.TopologicalSorter(graph).prepare()


KNOWN = {"fxquant", *(f"fxquant.{room}" for room in ROOMS), "fxquant.ops.library", "fxquant.prepared.quantizer"}


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        ("fxquant.ops.qdq", "from fxquant.numerics import quantize", None),
        ("fxquant.ops.qdq", "from . import library", None),
        ("fxquant.ops.qdq", "from ..spec import QuantSpec", "against the order"),
        ("fxquant.numerics.affine", "from fxquant import ops", "against the order"),
        ("fxquant.numerics.affine", "import fxquant.ops.qdq as q", "against the order"),
        ("fxquant.passes.base", "from ..backend import fxquant", "against the order"),
        ("fxquant.passes.base", "def f():\n    from ..backend import fxquant", "against the order"),
        ("fxquant.plan.plan", "if TYPE_CHECKING:\n    from fxquant.prepared.quantizer import Q", "against the order"),
        ("fxquant.plan.plan", "try:\n    from ..prepared import Q\nexcept ImportError: pass", "against the order"),
        ("fxquant.ops.qdq", "from fxquant import kernels", "do so in a function"),
        ("fxquant.ops.qdq", "def f():\n    from fxquant.kernels import launch", None),
        ("fxquant.kernels.cuda", "from fxquant.spec import QuantSpec", "against the order"),
        ("fxquant.kernels.cuda", "from fxquant import numerics", None),
        ("fxquant.plan.plan", "from fxquant import prepare_all", "name the module"),
        ("fxquant.shell.demo.job", "import fxquant", None),
    ],
)
def test_the_rules_themselves(importer: str, source: str, expected: str | None) -> None:
    found = imports_of(source, importer, False, KNOWN, "here")
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
