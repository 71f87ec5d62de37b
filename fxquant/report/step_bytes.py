"""Bytes of one training step: which quantizer moves them, and which keeps them for backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from fxquant.backend.inductor.step import Kept, Step, site_of
from fxquant.graph.frames import normalize_path, relative, user_line
from fxquant.graph.nodes import packet

Size: TypeAlias = "int | sympy.Expr"
"""Bytes: a number, or an expression in `BATCH` where the batch is left open."""

BATCH = sympy.Symbol("batch", integer=True, positive=True)


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one training step: read and written by its kernels, and saved by its forward for its backward.

    A kernel reads and writes each of its tensors once; what stays within a fused kernel costs nothing. The sum is
    Inductor's own count (``torch._inductor.metrics.num_bytes_accessed``). A write is charged to the site whose value
    it is. A read is charged to a site where no loop of the kernel that reads the tensor works for the model itself. A
    site's kernels contain what Inductor fuses in front of it, and the quantized tensor is often written *instead of*
    the float one: what quantizers add is the quantized step's less the plain one's.
    """

    read: Size = 0
    written: Size = 0
    saved: Size = 0

    @property
    def moved(self) -> Size:
        """Read and written."""
        return simplified(self.read + self.written)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            read=simplified(self.read + other.read),
            written=simplified(self.written + other.written),
            saved=simplified(self.saved + other.saved),
        )

    def to_dict(self) -> dict[str, int | str]:
        """Numbers, and expressions as text."""
        return {name: as_text(value) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """One quantizer: ``key``, ``role`` and ``spec`` as in `fxquant.explain`, and its share of the step's bytes."""

    key: str
    role: str
    spec: str
    bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One allocation that the forward graph hands to the backward graph; parameters, buffers and inputs are none.

    A site is charged with those that it made and those that only quantizers read; where there are several, the first.

    Attributes:
        size: its bytes; dtype, shape: of the (first) tensor in it.
        site: key of the quantizer that is charged with it, None for the model itself.
        made_by: the operator that made it and the module around, or the quantizer.
        serves: the operators of the backward graph that read it, likewise.
        source: file and line of the user's code that made it.
    """

    size: Size
    dtype: str
    shape: tuple[Size, ...]
    site: str | None
    made_by: str
    serves: tuple[str, ...]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values; expressions as text."""
        shape = [as_text(length) for length in self.shape]
        return {**vars(self), "size": as_text(self.size), "shape": shape, "serves": list(self.serves)}


# ---------------------------------------------------------------- charging


def bytes_by_site(step: Step) -> defaultdict[str | None, Bytes]:
    """Bytes read and written, by site; None is the model itself."""
    found: defaultdict[str | None, Bytes] = defaultdict(Bytes)
    for kernel in step.kernels:
        for access in kernel.reads:
            found[_charged(access.nodes)] += Bytes(read=_size(access.size, step))
        for access in kernel.writes:
            found[_charged(access.nodes)] += Bytes(written=_size(access.size, step))
    return found


def _charged(nodes: Iterable[fx.Node]) -> str | None:
    """The first site, if the nodes are all of sites."""
    sites = [site_of(node) for node in nodes]
    return sites[0] if sites and None not in sites else None


def saved_of(step: Step) -> tuple[Saved, ...]:
    """What the forward keeps, in the order in which it hands it on."""
    return tuple(_one_saved(kept, step) for kept in step.kept)


def _one_saved(kept: Kept, step: Step) -> Saved:
    return Saved(
        size=_size(kept.size, step),
        dtype=str(kept.dtype).removeprefix("torch."),
        shape=tuple(_size(length, step) for length in kept.shape),
        site=site_of(kept.node) or _charged(kept.readers),
        made_by=_described(kept.node),
        serves=tuple(dict.fromkeys(map(_described, kept.readers))),
        source=user_line(kept.node),
    )


def total_of(step: Step) -> Bytes:
    """The whole step's."""
    found = sum(bytes_by_site(step).values(), Bytes())
    return found + Bytes(saved=simplified(sum(_size(kept.size, step) for kept in step.kept)))


def _described(node: fx.Node) -> str:
    """``quantizer layer1.conv1.weight``, or the operator and the module that it ran in."""
    site = site_of(node)
    if site is not None:
        return f"quantizer {site}"
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [normalize_path(path) for path, _ in stack.values()]
    module = relative(paths[-1], paths[0]) if paths else ""
    if node.op == "placeholder":
        return "a parameter or input"  # kept in another layout than it came in
    origin = node.meta.get("original_aten")
    name = getattr(origin, "_opname", None) or getattr(packet(node), "__name__", str(packet(node)))
    return f"{name} in {module}" if module else str(name)


# ---------------------------------------------------------------- sizes


def _size(size: Any, step: Step) -> Size:
    """A size with the batch's symbols as `BATCH`."""
    expression = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
    return simplified(expression.subs(dict.fromkeys(step.open & expression.free_symbols, BATCH)))


def simplified(size: Any) -> Size:
    """Numbers as int."""
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def as_number(size: Size) -> int:
    """For sorting: an open size counts as a batch of 2."""
    return int(sympy.sympify(size).subs(BATCH, 2)) if isinstance(size, sympy.Expr) else size


def as_text(size: Size) -> int | str:
    """For plain values: an open size as sympy writes it."""
    return size if isinstance(size, int) else str(size)
