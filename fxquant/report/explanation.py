"""`explain`: every site of a prepared model, and what was left in float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxquant.backend import compile_reports
from fxquant.plan import Declined, Plan
from fxquant.state import BoundForward, Quantizer, bound_forward, owners, quantizers, require_plan, unwrap
from fxquant.table import table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site: what it is, why it is there, and whether a compiled graph has used it."""

    key: str
    role: str
    spec: str
    operators: str
    range: str
    status: str
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found; prints as two tables."""

    plan: Plan
    rows: tuple[Row, ...]
    declined: tuple[Declined, ...]
    compile_declines: tuple[str, ...]

    @property
    def unbound(self) -> tuple[str, ...]:
        """Sites that no compiled graph has used, or whose module ran in eager Python instead."""
        return tuple(row.key for row in self.rows if row.status != "compiled")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.plan.recipe,
            "target": self.plan.target,
            "sites": [vars(row) for row in self.rows],
            "declined": [vars(d) for d in self.declined],
            "compile_declines": list(self.compile_declines),
            "unbound": list(self.unbound),
        }

    def __str__(self) -> str:
        header = ("site", "role", "format", "range", "status", "why", "source")
        rows = [(r.key, r.role, r.spec, r.range, r.status, r.reason, r.source) for r in self.rows]
        parts = [f"recipe {self.plan.recipe!r} for {self.plan.target}: {len(rows)} sites", table(header, rows)]
        if self.declined:
            parts.append(f"\nleft in float: {len(self.declined)}")
            parts.append(table(("operator", "why", "source"), [(d.where, d.reason, d.source) for d in self.declined]))
        if self.compile_declines:
            parts.append("\nin compiled graphs:")
            parts += self.compile_declines
        return "\n".join(parts)


def explain(model: nn.Module) -> Explanation:
    """Every site of a prepared model with its reason, range and status, and every place left in float.

    Status: ``compiled`` once a compiled graph bound the site's owner; ``eager`` if Dynamo left the owner's frame
    in Python, where it runs in float; ``not yet run`` before the first compiled step.
    """
    plan = require_plan(model, "explain")
    model = unwrap(model)
    held = dict(quantizers(model))
    status = _statuses(model)
    rows = tuple(
        Row(
            key=site.key,
            role=site.local.role,
            spec=str(site.local.spec),
            operators=", ".join(map(str, site.local.edges)),
            range=_range(held[site.key]),
            status=status[site.owner],
            reason=site.reason,
            source=site.source,
        )
        for site in plan.sites
    )
    keys = {bound.key for bound in _bound(model).values()}
    reports = [report for report in compile_reports() if keys & set(report.digests)]
    declines = dict.fromkeys(str(decline) for report in reports for decline in report.declines)
    return Explanation(plan=plan, rows=rows, declined=plan.declined, compile_declines=tuple(declines))


def _bound(model: nn.Module) -> dict[str, BoundForward]:
    return {path: bound for path, module, _ in owners(model) if (bound := bound_forward(module)) is not None}


def _statuses(model: nn.Module) -> dict[str, str]:
    """Owner path → status.

    Instances of a class share compiled graphs, so that a graph exists is not enough: a range that is set says
    that this instance ran. Owners without ranges are judged by those of the whole model.
    """
    digests = {digest for report in compile_reports() for digest in report.digests}
    held = {
        path: [q for q in found.values() if isinstance(q, Quantizer) and q.stateful] for path, _, found in owners(model)
    }
    ran = {path for path, those in held.items() if any(not math.isnan(q.min_val.item()) for q in those)}
    found = {}
    for path, bound in _bound(model).items():
        seen = path in ran if held[path] else bool(ran)
        found[path] = "eager" if bound.eager_runs else "compiled" if seen and bound.key in digests else "not yet run"
    return found


def _range(quantizer: Quantizer) -> str:
    if not quantizer.stateful:
        return "of the tensor" if quantizer.spec.range.kind == "current" else ""
    low, high = quantizer.min_val.item(), quantizer.max_val.item()
    return "unset" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
