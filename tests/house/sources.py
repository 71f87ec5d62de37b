"""The sources of the package, as files and as imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_files(*folders: str) -> list[Path]:
    """Every Python file below some folders of the checkout."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def package_modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the passes under the name they are installed by."""
    found = {}
    for path in python_files("fxquant", "passes"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "passes":
            parts = ("fxquant", *parts)
        elif parts[1] == "passes":
            continue  # the same file, seen through the link
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below ``node``, with whether it runs later than the module's own import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from statements(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from statements(ast.Module([statement], []), lazy)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, lazy or later)
