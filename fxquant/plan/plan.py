"""The plan of a model: which tensors are quantized, how, for which consumers, and why.

A plan is data. It is made once by `prepare`, saved in checkpoints, and read by every compile and export, so a
compile unit that sees only a part of the model still does its part the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fxquant.errors import PlanMismatch
from fxquant.graph.frames import without_wrappers
from fxquant.spec.quant_spec import TOKEN, QuantSpec

VERSION = 3
_READ = (1, 2, 3)  # 1 has no groups, 2 no delayed ranges, early 3 no shapes: what is missing there has its default
Role = Literal["weight", "activation", "output"]


@dataclass(frozen=True, kw_only=True, order=True)
class Edge:
    """One operand of one operator, as its owner's frame sees it.

    Attributes:
        path: the module that runs the operator, relative to the owner ("" for the owner itself).
        kind: operator kind, as in `fxquant.graph.kinds.KINDS`.
        ordinal: which of the operators of that kind that the module itself runs, in execution order.
        operand: name of the operand; "output" for the operator's own result.
        lines: where each of these operators is written (`fxquant.graph.frames.own_line`), "" for those that a module
            of torch's calls. Where a graph has another number of them, as in evaluation, they tell which is which. No
            part of a plan's identity.
    """

    path: str
    kind: str
    ordinal: int
    operand: str
    lines: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.path + '.' if self.path else ''}{self.kind}{self.ordinal}.{self.operand}"

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"path": self.path, "kind": self.kind, "ordinal": self.ordinal, "operand": self.operand}


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """One quantized tensor as its owner knows it: equal for every instance of a class.

    role "weight": the operand itself; "activation": the tensor the edges read, wherever it was made; "output":
    the result of the edge's operator and what is fused after it, for all its users.
    """

    name: str
    role: Role
    spec: QuantSpec
    edges: tuple[Edge, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "role": self.role,
            "spec": self.spec.to_dict(),
            "edges": [edge.to_dict() for edge in self.edges],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LocalSite:
        """Inverse of `to_dict`."""
        edges = tuple(Edge(**edge) for edge in fields["edges"])
        return cls(name=fields["name"], role=fields["role"], spec=QuantSpec.from_dict(fields["spec"]), edges=edges)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A local site with its place in the model, why it is there and where the user wrote it.

    ``matrix`` is the channel axis and the length of a channel, for weights whose format may be per group; ``shape``
    that of a weight, where it is fixed.
    """

    owner: str
    local: LocalSite
    reason: str
    source: str = ""
    matrix: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None

    @property
    def scales(self) -> int | None:
        """How many scales its format has; None where that is not known."""
        spec = self.local.spec
        below_tensor = spec.group_size is not None and not spec.range.per_group  # kept is the range of the tensor
        if below_tensor or (spec.group_size is None and spec.axis is None):
            return 1
        if self.shape is None:
            return None
        if spec.group_size is None:
            return self.shape[spec.axis or 0]
        along = self.shape[1 if spec.axis == 0 else 0]
        return math.prod(self.shape) // (along if spec.group_size == TOKEN else spec.group_size)

    @property
    def key(self) -> str:
        """``layer1.0.conv1.weight``: unique in the model, the name in every report."""
        return f"{self.owner}.{self.local.name}" if self.owner else self.local.name


@dataclass(frozen=True, kw_only=True)
class FloatPlace:
    """A place that was looked at and left in float, with the reason."""

    where: str
    reason: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All sites of a model, by owner, in execution order."""

    recipe: str
    target: str
    sites: tuple[Site, ...]
    declined: tuple[FloatPlace, ...] = ()

    def owners(self) -> dict[str, tuple[Site, ...]]:
        """Owner path → its sites."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.owner, []).append(site)
        return {owner: tuple(sites) for owner, sites in found.items()}

    def digest(self) -> str:
        """Tells plans apart: what differs in anything that is saved has another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """For checkpoints."""
        sites = [{**vars(site), "local": site.local.to_dict()} for site in self.sites]
        declined = [dataclasses.asdict(d) for d in self.declined]
        fields = {
            "version": VERSION,
            "recipe": self.recipe,
            "target": self.target,
            "sites": sites,
            "declined": declined,
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`; PlanMismatch when another version wrote it."""
        fields = json.loads(text)
        if fields["version"] not in _READ:
            raise PlanMismatch(
                f"checkpoint's plan must be of version {_READ[0]} to {VERSION}: got {fields['version']}. "
                "Load it with the fxquant that wrote it and save the float weights with fxquant.strip."
            )
        sites = tuple(_site(s) for s in fields["sites"])
        declined = tuple(FloatPlace(**d) for d in fields["declined"])
        return cls(recipe=fields["recipe"], target=fields["target"], sites=sites, declined=declined)

    def difference(self, other: Plan) -> list[str]:
        """What another plan has otherwise, one line per site; empty when they quantize alike."""
        mine, theirs = ({without_wrappers(site.key): site.local for site in plan.sites} for plan in (self, other))
        lines = [f"only in the model: {key}" for key in mine if key not in theirs]
        lines += [f"only in the checkpoint: {key}" for key in theirs if key not in mine]
        for key in mine.keys() & theirs.keys():
            if mine[key] != theirs[key]:
                here, there = _what_differs(mine[key], theirs[key])
                lines.append(f"{key}: {here} in the model, {there} in the checkpoint")
        return sorted(lines)


def _site(fields: dict[str, Any]) -> Site:
    matrix, shape = fields.get("matrix"), fields.get("shape")
    return Site(
        owner=fields["owner"],
        local=LocalSite.from_dict(fields["local"]),
        reason=fields["reason"],
        source=fields["source"],
        matrix=None if matrix is None else (matrix[0], matrix[1]),
        shape=None if shape is None else tuple(shape),
    )


def _what_differs(mine: LocalSite, theirs: LocalSite) -> tuple[str, str]:
    """Both sites in the shortest words that tell them apart."""
    for name in ("spec", "role", "edges"):
        left, right = getattr(mine, name), getattr(theirs, name)
        if left != right and name == "spec" and str(left) == str(right):
            left, right = (_fields_apart(spec, other) for spec, other in ((left, right), (right, left)))
        if left != right:
            return _words(left), _words(right)
    return mine.name, theirs.name


def _fields_apart(spec: QuantSpec, other: QuantSpec) -> str:
    names = [field.name for field in dataclasses.fields(spec)]
    return ", ".join(f"{n}={getattr(spec, n)}" for n in names if getattr(spec, n) != getattr(other, n))


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
