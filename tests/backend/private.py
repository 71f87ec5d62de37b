"""Which private symbols of torch the sources use: found in them, not remembered."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.house.sources import ROOT, package_modules

# Public by name, and unstable by torch's own word.
UNSTABLE = ("torch.fx.experimental",)


@dataclass
class Use:
    """A symbol, the files that use it, and the calls: how many positional arguments, which keywords."""

    symbol: str
    files: set[str] = field(default_factory=set)
    calls: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)


def is_private(symbol: str) -> bool:
    """``torch._inductor.ir`` and ``torch.nn.Module._buffers`` are; ``torch.nn.Module.__init__`` is not."""
    parts = symbol.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "torch" and (hidden or symbol.startswith(UNSTABLE))


def chain(node: ast.AST) -> list[str]:
    """``a.b.c`` → its names; empty for what is no such chain."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def imported(tree: ast.AST) -> dict[str, str]:
    """Names in a module → what of torch they stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({a.asname or "torch": a.name if a.asname else "torch" for a in node.names if is_torch(a.name)})
        elif isinstance(node, ast.ImportFrom) and not node.level and is_torch(node.module or ""):
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def uses_in(source: str, file: str) -> Iterator[Use]:
    """Imports, attribute chains and calls, and functions named in text as ``module:Class.name``."""
    tree = ast.parse(source)
    names = imported(tree)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (parts := chain(node.func)) and parts[0] in names:
            given = [keyword.arg for keyword in node.keywords]
            starred = None in given or any(isinstance(each, ast.Starred) for each in node.args)
            call = set() if starred else {(len(node.args), tuple(sorted(map(str, given))))}
            yield Use(".".join([names[parts[0]], *parts[1:]]), {file}, call)
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            if (parts := chain(node)) and parts[0] in names:
                yield Use(".".join([names[parts[0]], *parts[1:]]), {file})
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch[\w.]*:[\w.]+", str(node.value)):
            yield Use(str(node.value).replace(":", "."), {file})


def private_uses(sources: Mapping[str, str] | None = None) -> dict[str, Use]:
    """Of the whole package: symbol → its use."""
    if sources is None:
        paths = {path.resolve() for path in package_modules().values()}
        sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}
    found: dict[str, Use] = {}
    for file, source in sources.items():
        for use in uses_in(source, file):
            if is_private(use.symbol):
                known = found.setdefault(use.symbol, Use(use.symbol))
                known.files |= use.files
                known.calls |= use.calls
    return found


def private_attributes(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """``x._name`` where no class or module of ours has that name → the files."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {n.attr for n in nodes if isinstance(n, ast.Attribute) and chain(n)[:1] in (["self"], ["cls"])}
    own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)} | set(dir(builtins))
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        names = imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
                if chain(node)[:1] and chain(node)[0] in names:
                    continue  # a symbol
                found.setdefault(node.attr, set()).add(file)
    return found
