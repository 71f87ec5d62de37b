"""A table of costs: times of products as integers and in float, and of what stands between the two.

A table is a JSON file, written by ``python -m fxquant costs`` (`fxquant.onnx.costing`), for one runtime, one class of
CPU and one thread. Times are those inside of a net: a layer's neighbours have its form, so that neither codes nor
layouts change around it; what such a change costs stands apart, by the numbers that it is made of.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.targets.cpu import integer_dot_support, integer_matrices
from fxquant.targets.document import ModelPath

_FOLDER = Path(__file__).parent
_NEAREST = 4
_FARTHEST = 5.0  # octaves from the nearest row, in all sizes together: beyond that a table says nothing
_FIELDS = ("target", "version", "cpu", "machine", "date", "threads")

FAMILIES = ("conv", "product")
EDGES = ("enter", "leave", "reorder", "to_integer", "to_float")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A layer as a table knows it, for a batch of one.

    Attributes:
        op: ``"conv"``, ``"pointwise"`` (a kernel of one pixel), ``"depthwise"``, ``"linear"``, ``"matmul"``, ``"add"``.
        rows: results in a channel: pixels of a picture, rows of a product in all of its batches; elements of an add.
        depth: multiply-adds of a result.
        columns: channels of the result.
        stride: the largest of a convolution's.
    """

    op: str
    rows: int
    depth: int = 1
    columns: int = 1
    stride: int = 1

    @property
    def work(self) -> int:
        """Multiply-adds, or elements of an add."""
        return self.rows * self.depth * self.columns

    def octaves_to(self, other: Size) -> float:
        """How far another layer of the same operator is, in powers of two."""
        pairs = zip(dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:], strict=True)
        return math.sqrt(sum(math.log2(mine / theirs) ** 2 for mine, theirs in pairs))

    def __str__(self) -> str:
        if self.op == "add":
            return f"add of {self.rows}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.op} {self.rows}×{self.depth}·{self.depth}×{self.columns}{stride}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Microseconds of one run."""

    integer: float
    plain: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured layer."""

    size: Size
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Line:
    """Microseconds of a change of form: ``fixed``, and ``each`` for a thousand numbers."""

    fixed: float
    each: float

    def at(self, numbers: float) -> float:
        """Microseconds for so many."""
        return self.fixed + self.each * numbers / 1000


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The costs of one runtime on one class of CPU.

    Attributes:
        target, version: the runtime.
        cpu: the class of CPU, as `cpu_class` names it; ``machine`` the CPU that it was measured on.
        threads: of the runtime.
        edges: family (``"conv"``, ``"product"``) → what a change of form costs: ``"enter"`` (floats of other operators
            → an integer layer), ``"leave"`` (the reverse), ``"reorder"`` (floats between a float layer and other
            operators), ``"to_integer"`` (a float layer → an integer one) and ``"to_float"`` (the reverse).
    """

    target: str
    version: str
    cpu: str
    machine: str
    date: str
    threads: int
    rows: tuple[Row, ...]
    edges: Mapping[str, Mapping[str, Line]]

    def estimate(self, size: Size) -> Cost | None:
        """From the nearest rows of the operator, by time for each multiply-add; None where no row is near."""
        near = sorted((row.size.octaves_to(size), index, row) for index, row in enumerate(self._rows(size.op)))[
            :_NEAREST
        ]
        if not near or near[0][0] > _FARTHEST:
            return None
        weights = [1 / (distance + 0.05) ** 2 for distance, _, _ in near]
        found = {}
        for form in ("integer", "plain"):
            logs = [math.log(getattr(row.cost, form) / row.size.work) for _, _, row in near]
            mean = sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)
            found[form] = math.exp(mean) * size.work
        return Cost(**found)

    def _rows(self, op: str) -> list[Row]:
        return [row for row in self.rows if row.size.op == op]

    def __str__(self) -> str:
        return f"{self.target} {self.version}, {self.cpu}"

    def to_json(self) -> str:
        """As `load` reads it, a line for each row."""
        rows = [
            [*dataclasses.astuple(row.size), round(row.cost.integer, 2), round(row.cost.plain, 2)] for row in self.rows
        ]
        edges = {
            family: {name: [round(line.fixed, 3), round(line.each, 4)] for name, line in lines.items()}
            for family, lines in self.edges.items()
        }
        head = {name: getattr(self, name) for name in _FIELDS} | {"edges": edges}
        body = ",\n".join("  " + json.dumps(row) for row in rows)
        return json.dumps(head)[:-1] + ',\n"rows": [\n' + body + "\n]}\n"

    @classmethod
    def load(cls, path: ModelPath) -> CostTable:
        """Reads a table. Raises InvalidArgument for a file that is none."""
        try:
            return cls._of(json.loads(Path(path).read_text()))
        except OSError as error:
            raise InvalidArgument(
                f"a table of costs must be a file: got {os.fspath(path)!r} ({error.strerror})."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"{os.fspath(path)} must be a table of costs, as `python -m fxquant costs --output` writes it: "
                f"got {type(error).__name__}: {error}."
            ) from error

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> CostTable:
        rows = tuple(
            Row(
                size=Size(op=str(op), rows=int(rows), depth=int(depth), columns=int(columns), stride=int(stride)),
                cost=Cost(integer=float(integer), plain=float(plain)),
            )
            for op, rows, depth, columns, stride, integer, plain in fields["rows"]
        )
        if not rows or not all(map(_is_sound, rows)):
            raise ValueError("rows must hold sizes of at least 1, and times above 0")
        given = {family: {name: map(float, fields["edges"][family][name]) for name in EDGES} for family in FAMILIES}
        edges = {
            family: {name: Line(**dict(zip(("fixed", "each"), pair, strict=True))) for name, pair in lines.items()}
            for family, lines in given.items()
        }
        numbers = [number for lines in edges.values() for line in lines.values() for number in (line.fixed, line.each)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("edges must hold times of at least 0")
        return cls(**{name: fields[name] for name in _FIELDS}, rows=rows, edges=edges)


def _is_sound(row: Row) -> bool:
    times, sizes = (row.cost.integer, row.cost.plain), dataclasses.astuple(row.size)[1:]
    return all(math.isfinite(time) and time > 0 for time in times) and min(sizes) >= 1


def cpu_class(cpuinfo: ModelPath = "/proc/cpuinfo") -> str:
    """The name of this machine's class of CPU.

    ``"x86_64-amx"`` with products of matrices of bytes, ``"x86_64-vnni"`` with dot products of them, else ``"x86_64"``;
    likewise ``"aarch64-dot"`` and ``"aarch64"``.
    """
    machine = platform.machine().lower()
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if integer_dot_support(cpuinfo) is not None:
        return name
    return f"{name}-{'dot' if name != 'x86_64' else 'amx' if integer_matrices(cpuinfo) else 'vnni'}"


@functools.cache
def shipped(target: str, cpu: str | None = None) -> CostTable:
    """The table that fxquant has for a target on a class of CPU, this machine's by default.

    Raises InvalidArgument where it has none, with the command that measures one.
    """
    cpu = cpu_class() if cpu is None else cpu
    path = _FOLDER / f"{target}.{cpu}.json"
    if path.exists():
        return CostTable.load(path)
    held = sorted(each.stem.partition(".") for each in _FOLDER.glob("*.json"))
    if target not in [name for name, _, _ in held]:
        known = ", ".join(dict.fromkeys(repr(name) for name, _, _ in held))
        raise InvalidArgument(
            f"skip_slow must be for a target whose costs are measured, {known}: got {target!r}. Leave it out."
        )
    classes = ", ".join(cpu for name, _, cpu in held if name == target)
    raise InvalidArgument(
        f"skip_slow must have a table of costs for {target} on a CPU of class {cpu!r}: fxquant has one for {classes}. "
        f"Measure one on a machine like those that will run the model, `fxquant costs --target {target} --output "
        "costs.json`, and give skip_slow='costs.json'."
    )
