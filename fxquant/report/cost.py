"""`cost`: the memory that a training step of a prepared model moves and keeps, and which quantizer is why."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx, nn

from fxquant.backend.inductor.step import Kept, Step, site_of, trace_step
from fxquant.errors import InvalidArgument
from fxquant.graph.frames import normalize_path, relative, user_line
from fxquant.graph.nodes import packet
from fxquant.plan.plan import Plan
from fxquant.prepared.root import require_plan, unwrap
from fxquant.support.table import megabytes, table

Size: TypeAlias = "int | sympy.Expr"
"""Bytes: a number, or an expression in `BATCH` where the batch is left open."""

BATCH = sympy.Symbol("batch", integer=True, positive=True)
_LINES = 12  # of the table of kept tensors that are printed


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one training step: read and written by its kernels, and saved by its forward for its backward."""

    read: Size = 0
    written: Size = 0
    saved: Size = 0

    @property
    def moved(self) -> Size:
        """Read and written."""
        return _plain(self.read + self.written)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            read=_plain(self.read + other.read),
            written=_plain(self.written + other.written),
            saved=_plain(self.saved + other.saved),
        )

    def to_dict(self) -> dict[str, int | str]:
        """Numbers, and expressions as text."""
        return {name: _shown(value) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """One quantizer: ``key``, ``role`` and ``spec`` as in `fxquant.explain`, and its share of the step's bytes."""

    key: str
    role: str
    spec: str
    bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One allocation that the forward keeps for the backward; parameters, buffers and inputs are none.

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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What `cost` found; prints as tables.

    ``total`` is the quantized step, ``plain`` the same step without quantizers, ``rest`` what of ``total`` no site is
    charged with. ``saved`` and ``plain_saved`` list the allocations behind ``total.saved`` and ``plain.saved``.
    ``batch`` is the batch size of the example inputs where it was left open, else None.
    """

    plan: Plan
    training: bool
    sites: tuple[SiteCost, ...]
    rest: Bytes
    total: Bytes
    plain: Bytes
    saved: tuple[Saved, ...]
    plain_saved: tuple[Saved, ...]
    batch: int | None = None

    def at(self, batch: int) -> Cost:
        """The same report with numbers: those of a step on ``batch`` samples.

        Raises InvalidArgument where `cost` did not leave the batch open, and for sizes below 2, which compile apart.
        """
        if self.batch is None:
            raise InvalidArgument(
                "at must be asked of a report with an open batch: got one of a fixed size. "
                "Write fxquant.cost(model, args, dynamic_batch=True)."
            )
        if not isinstance(batch, int) or batch < 2:
            raise InvalidArgument(f"batch must be a whole number above 1: got {batch!r}. torch compiles 1 by itself.")
        found = _replaced(self, lambda size: _plain(sympy.sympify(size).subs(BATCH, batch)))
        return dataclasses.replace(found, batch=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; expressions as text."""
        return {
            "recipe": self.plan.recipe,
            "target": self.plan.target,
            "training": self.training,
            "batch": self.batch,
            "sites": [{**vars(site), "bytes": site.bytes.to_dict()} for site in self.sites],
            **{name: getattr(self, name).to_dict() for name in ("rest", "total", "plain")},
            **{name: [_saved_dict(one) for one in getattr(self, name)] for name in ("saved", "plain_saved")},
        }

    def __str__(self) -> str:
        shown = self.at(self.batch) if self.batch is not None else self
        head = f"one {'training' if self.training else 'eval-mode'} step, recipe {self.plan.recipe!r}"
        head += f" for {self.plan.target}" + (f", batch {self.batch}" if self.batch is not None else "")
        rows = [[name, *_cells(part)] for name, part in (("plain", shown.plain), ("quantized", shown.total))]
        rows.append(["ratio", *(_ratio(shown.total, shown.plain, name) for name in ("read", "written", "saved"))])
        parts = [head, "", table(["", "read", "written", "saved for backward"], rows)]
        if self.batch is not None:
            parts.append(f"saved: plain {self.plain.saved}, quantized {self.total.saved} bytes")
        sites = sorted(shown.sites, key=lambda site: -(_number(site.bytes.moved) + _number(site.bytes.saved)))
        by_site = [[site.key, site.role, site.spec, *_cells(site.bytes)] for site in sites]
        by_site.append(["(the model)", "", "", *_cells(shown.rest)])
        parts += ["", table(["site", "role", "format", "read", "written", "saved"], by_site)]
        kept = sorted(shown.saved, key=lambda one: -_number(one.size))
        lines = [[_amount(one.size), one.dtype, _shape(one), one.made_by, _listed(one.serves)] for one in kept]
        parts += ["", table(["saved", "dtype", "shape", "made by", "read in backward by"], lines[:_LINES])]
        if len(lines) > _LINES:
            parts.append(f"… and {len(lines) - _LINES} smaller: see .saved")
        return "\n".join(parts)


def cost(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = False,
) -> Cost:
    """Bytes that a compiled training step of a prepared model reads, writes and saves for backward, site by site.

    Both steps, quantized and plain, go through the pipeline that ``torch.compile`` runs, from Dynamo to Inductor's
    schedule, on fake tensors: no kernel is compiled, nothing is computed, and the model stays as it was. The step is
    that of the model as it is: its modes, frozen ranges, ``requires_grad``, and autocast around this call. Ranges
    count as set.

    **Counting**: a kernel reads and writes each of its tensors once; what stays within a fused kernel costs nothing.
    The sum is Inductor's own count (``torch._inductor.metrics.num_bytes_accessed``). A write is charged to the site
    whose value it is. A read is charged to a site where no loop of the kernel that reads the tensor works for the
    model itself. A site's kernels contain what Inductor fuses in front of it, and the quantized tensor is often
    written *instead of* the float one: what quantizers add is ``total`` less ``plain``.

    **Saved** are allocations, each once, that the forward graph hands to the backward graph. A site is charged with
    those that it made and those that only quantizers read; where there are several, the first.

    Args:
        model: prepared, maybe compiled; all of it must be one graph.
        args: example inputs, a tuple; ``kwargs``: keyword ones.
        dynamic_batch: leave dimension 0 of every tensor that shares the first one's batch size open. Sizes are then
            sympy expressions in ``batch``, and `Cost.at` gives numbers: those of the graphs for an open batch, in which
            Inductor may fuse a few loops otherwise.

    Raises InvalidArgument for an unprepared model, inputs that it cannot run on and a model with nothing to train;
    UnsupportedModel where the graph breaks, and where the model fixes the batch that is to be open.

    Source: the partitioner of AOTAutograd (`min-cut rematerialization`), and Inductor's scheduler.
    """
    plan = require_plan(model, "cost")
    model, named = unwrap(model), dict(kwargs or {})
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"args must be a tuple of example inputs: got {type(args).__name__}. Write (x,) for a single input."
        )
    batch = _batch(args, named) if dynamic_batch else None
    plain = trace_step(model, args, named, quantized=False, batch=batch)
    step = trace_step(model, args, named, quantized=True, batch=batch)
    return _cost_of(plan, plain, step, training=model.training, batch=batch)


def _cost_of(plan: Plan, plain: Step, step: Step, *, training: bool, batch: int | None) -> Cost:
    """The bytes of two steps by the sites of a plan."""
    saved, by_site = _saved(step), _by_site(step)
    for one in saved:
        by_site[one.site] += Bytes(saved=one.size)
    sites = [
        SiteCost(key=site.key, role=site.local.role, spec=str(site.local.spec), bytes=by_site.pop(site.key, Bytes()))
        for site in plan.sites
    ]
    rest = sum(by_site.values(), Bytes())
    return Cost(
        plan=plan,
        training=training,
        sites=tuple(sites),
        rest=rest,
        total=sum((site.bytes for site in sites), rest),
        plain=_total(plain),
        saved=saved,
        plain_saved=_saved(plain),
        batch=batch,
    )


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.dim()]
    size = int(tensors[0].shape[0]) if tensors else 0
    if size < 2:
        raise InvalidArgument(
            f"args must have a batch of at least 2 to be left open: got {size}. torch compiles a batch of 1 by itself."
        )
    return size


# ---------------------------------------------------------------- charging


def _by_site(step: Step) -> defaultdict[str | None, Bytes]:
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


def _saved(step: Step) -> tuple[Saved, ...]:
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


def _total(step: Step) -> Bytes:
    found = sum(_by_site(step).values(), Bytes())
    return found + Bytes(saved=_plain(sum(_size(kept.size, step) for kept in step.kept)))


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
    return _plain(expression.subs(dict.fromkeys(step.open & expression.free_symbols, BATCH)))


def _plain(size: Any) -> Size:
    """Numbers as int."""
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def _number(size: Size) -> int:
    """For sorting: an open size counts as a batch of 2."""
    return int(sympy.sympify(size).subs(BATCH, 2)) if isinstance(size, sympy.Expr) else size


def _replaced(value: Any, change: Callable[[Size], Size]) -> Any:
    """The report with every expression changed."""
    if isinstance(value, sympy.Expr):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_replaced(one, change) for one in value)
    if isinstance(value, (Cost, SiteCost, Bytes, Saved)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _replaced(one, change) for name, one in fields.items()})
    return value


# ---------------------------------------------------------------- showing


def _shown(size: Size) -> int | str:
    return size if isinstance(size, int) else str(size)


def _saved_dict(one: Saved) -> dict[str, Any]:
    return {**vars(one), "size": _shown(one.size), "shape": [_shown(n) for n in one.shape], "serves": list(one.serves)}


def _amount(size: Size) -> str:
    if not isinstance(size, int):
        return str(size)
    return megabytes(size) if size >= 1000 else f"{size} B"


def _cells(part: Bytes) -> list[str]:
    return [_amount(part.read), _amount(part.written), _amount(part.saved)]


def _ratio(ours: Bytes, plain: Bytes, name: str) -> str:
    top, bottom = getattr(ours, name), getattr(plain, name)
    return f"{top / bottom:.2f}" if isinstance(top, int) and isinstance(bottom, int) and bottom else ""


def _shape(one: Saved) -> str:
    return "×".join(str(length) for length in one.shape) or "()"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
