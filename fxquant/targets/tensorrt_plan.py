"""What a TensorRT for RTX plan will run: its operations, with the types that they read and write.

The plan holds its compiled graphs as text, each a C string: blocks ``descriptors {`` with a line for each tensor, its
name and its type, and blocks ``main {`` with a line for each operation. NVIDIA's inspector tells the same of an engine,
for which it must have a GPU. Seen in plans of TensorRT for RTX 1.7.1.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fxquant.errors import ExportError

# Operations that multiply matrices → what reports call them.
PRODUCTS = {
    "corrltn": "convolution",
    "fully_connected": "matrix product",
    "deconvolution": "transposed convolution",
    "_gemm_mha_v2": "fused attention",
}

_GRAPH = b"\ndescriptors {"
_QUOTED = r'"(?:[^"\\]|\\.)*"'  # names may hold whatever the file's do: brackets and line breaks too
_LINE = re.compile(rf'^  (\w+)=\{{ ((?:[^"\n]|{_QUOTED})*)\}}$', re.MULTILINE | re.DOTALL)
_FIELD = re.compile(rf"(\w+)=(\{{(?:[^\"{{}}]|{_QUOTED})*\}}|{_QUOTED}|\S+)", re.DOTALL)
# A node of a branch is followed by what it stands in: ``[ONNX Layer: node | graph (then_branch) | choose (If)]``.
_LAYER = re.compile(r"\[ONNX Layer: ([^\]|]*?)(?: \| [^\]]*)?\]")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of the plan.

    Attributes:
        kind: as the plan names it: a key of `PRODUCTS`, ``"function"`` for a generated kernel, and others.
        reads, writes: types of its operands and results, as the plan names them: ``"int8"``, ``"float"``, ``"half"``.
        nodes: names of the file's nodes that it stands for.
    """

    kind: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[str, ...]


def operations(path: Path) -> list[Operation]:
    """Those of the plan at ``path``. Raises ExportError where it holds no readable graph."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        found = [operation for text in _graphs(plan) for operation in _operations(text)]
    if not found:
        raise ExportError(
            f"{path} must hold its operations as text, as plans of TensorRT for RTX 1.7.1 do: got none. Which "
            "products run on integers cannot be read from it: install tensorrt-rtx 1.7.1."
        )
    return found


def _graphs(plan: mmap.mmap) -> Iterator[str]:
    start = plan.find(_GRAPH)
    while start >= 0:
        end = plan.find(b"\0", start)
        yield plan[start:end].decode("latin1")
        start = plan.find(_GRAPH, end)


def _operations(text: str) -> Iterator[Operation]:
    types: dict[str, str] = {}
    for line in _LINE.finditer(text):
        kind, fields = line[1], dict(reversed(_FIELD.findall(line[2])))  # of two alike the first
        name = _unquoted(fields.get("name", ""))
        if kind.endswith("tensor") and name and "type" in fields:
            types[name] = fields["type"]
        elif name:
            prefix = ("input_args", "output_args") if kind == "function" else ("input", "output")
            reads, writes = (_listed(fields.get(key, ""), types) for key in prefix)
            layers = tuple(_LAYER.findall(fields.get("layers", "")))
            kind = name if kind == "function" and name in PRODUCTS else kind  # fused attention is called like one
            yield Operation(kind=kind, name=name, reads=reads, writes=writes, nodes=layers)


def _listed(names: str, types: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(types.get(_unquoted(name), "unknown") for name in re.findall(_QUOTED, names, re.DOTALL))


def _unquoted(name: str) -> str:
    return name[1:-1] if name.startswith('"') else name
