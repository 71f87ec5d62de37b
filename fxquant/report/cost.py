"""`cost`: the memory that a training step of a prepared model moves and keeps, and which quantizer is why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from fxquant.backend.inductor.step import Step, trace_step
from fxquant.capture.arguments import check_args
from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.prepared.root import require_plan, unwrap
from fxquant.report.step_bytes import (
    BATCH,
    Bytes,
    Saved,
    SiteCost,
    Size,
    as_number,
    bytes_by_site,
    saved_of,
    simplified,
    total_of,
)
from fxquant.report.step_products import StepProduct, products_of_step
from fxquant.support.table import megabytes, table

_LINES = 12  # of the table of kept tensors that are printed


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What `cost` found; prints as tables.

    ``total`` is the quantized step, ``plain`` the same step without quantizers, ``rest`` what of ``total`` no site is
    charged with. ``saved`` and ``plain_saved`` list the allocations that add up to ``total.saved`` and ``plain.saved``.
    ``batch`` is the batch size of the example inputs where it was left open, else None. ``products`` are those of the
    quantized step, forward and backward, and whether they multiply codes.
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
    products: tuple[StepProduct, ...] = ()

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
        found = _replaced(self, lambda size: simplified(sympy.sympify(size).subs(BATCH, batch)))
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
            **{name: [one.to_dict() for one in getattr(self, name)] for name in ("saved", "plain_saved", "products")},
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
        sites = sorted(shown.sites, key=lambda site: -(as_number(site.bytes.moved) + as_number(site.bytes.saved)))
        by_site = [[site.key, site.role, site.spec, *_cells(site.bytes)] for site in sites]
        by_site.append(["(the model)", "", "", *_cells(shown.rest)])
        parts += ["", table(["site", "role", "format", "read", "written", "saved"], by_site)]
        kept = sorted(shown.saved, key=lambda one: -as_number(one.size))
        lines = [[_amount(one.size), one.dtype, _shape(one), one.made_by, _listed(one.serves)] for one in kept]
        parts += ["", table(["saved", "dtype", "shape", "made by", "read in backward by"], lines[:_LINES])]
        if len(lines) > _LINES:
            parts.append(f"… and {len(lines) - _LINES} smaller: see .saved")
        if any(one.integer for one in self.products):
            parts += ["", _products_table(self.products)]
        return "\n".join(parts)


def cost(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Cost:
    """Bytes that a compiled training step of a prepared model reads, writes and saves for backward, site by site.

    Both steps, quantized and plain, go through the pipeline that ``torch.compile`` runs, from Dynamo to Inductor's
    schedule, on fake tensors: no kernel is compiled, nothing is computed, and the model stays as it was. The step is
    that of the model as it is: its modes, frozen ranges, ``requires_grad``, and autocast around this call. Ranges
    count as set.

    `Bytes` says how they are counted, `Saved` which allocations are, and both whom they are charged to.

    Args:
        model: prepared, maybe compiled; all of it must be one graph.
        args: example inputs, a tuple; ``kwargs``: keyword ones.
        dynamic_batch: leave dimension 0 of every tensor that shares the first one's batch size open. Sizes are then
            sympy expressions in ``batch``, and `Cost.at` gives numbers: those of the graphs for an open batch, in which
            Inductor may fuse a few loops otherwise.
        options: of backend "fxquant", as the step is to be compiled with: `Cost.products` then says which products
            multiply codes. Without ``reuse_weights``, whose steps are not alike.

    Raises InvalidArgument for an unprepared model, inputs that it cannot run on and a model with nothing to train;
    UnsupportedModel where the graph breaks, and where the model fixes the batch that is to be open.

    Source: the partitioner of AOTAutograd (`min-cut rematerialization`), and Inductor's scheduler.
    """
    plan = require_plan(model, "cost")
    model, named = unwrap(model), dict(kwargs or {})
    check_args(args)
    batch = _batch(args, named) if dynamic_batch else None
    plain = trace_step(model, args, named, quantized=False, batch=batch)
    _refuse_kept_weights(options or {})
    step = trace_step(model, args, named, quantized=True, batch=batch, options=options)
    return cost_of(plan, plain, step, training=model.training, batch=batch)


def _refuse_kept_weights(options: Mapping[str, Any]) -> None:
    if options.get("reuse_weights"):
        raise InvalidArgument(
            "options['reuse_weights'] must be left out where a step's cost is counted: got True. Its steps are not "
            "alike: weights are quantized in those after a change only."
        )


def cost_of(plan: Plan, plain: Step, step: Step, *, training: bool, batch: int | None) -> Cost:
    """The bytes of two steps by the sites of a plan."""
    saved, by_site = saved_of(step), bytes_by_site(step)
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
        plain=total_of(plain),
        saved=saved,
        plain_saved=saved_of(plain),
        batch=batch,
        products=products_of_step(step),
    )


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.dim()]
    size = int(tensors[0].shape[0]) if tensors else 0
    if size < 2:
        raise InvalidArgument(
            f"args must have a batch of at least 2 to be left open: got {size}. torch compiles a batch of 1 by itself."
        )
    return size


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


def _amount(size: Size) -> str:
    if not isinstance(size, int):
        return str(size)
    return megabytes(size) if size >= 1000 else f"{size} B"


def _products_table(products: tuple[StepProduct, ...]) -> str:
    """Those alike in one line, the largest share first."""
    alike: dict[tuple[str, str, str, bool], list[float]] = {}
    for one in products:
        shapes = " · ".join("x".join(map(str, shape)) for shape in one.shapes[:3])
        alike.setdefault((one.half, one.operator, shapes, one.integer), []).append(one.share)
    ordered = sorted(alike.items(), key=lambda item: -sum(item[1]))
    lines = [
        [half, operator, shapes, str(len(shares)), "integer" if integer else "float", f"{sum(shares):.1%}"]
        for (half, operator, shapes, integer), shares in ordered
    ]
    return table(["products", "operator", "operands", "times", "as", "of the work"], lines)


def _cells(part: Bytes) -> list[str]:
    return [_amount(part.read), _amount(part.written), _amount(part.saved)]


def _ratio(ours: Bytes, plain: Bytes, name: str) -> str:
    top, bottom = getattr(ours, name), getattr(plain, name)
    return f"{top / bottom:.2f}" if isinstance(top, int) and isinstance(bottom, int) and bottom else ""


def _shape(one: Saved) -> str:
    return "×".join(str(length) for length in one.shape) or "()"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
