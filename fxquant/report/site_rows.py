"""The sites of a prepared model as rows: what each is, why it is there, whether a compiled graph has used it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fxquant.backend.reports import compile_reports
from fxquant.plan.plan import Plan
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import Quantizer, QuantizerSet, owners, quantizers
from fxquant.prepared.staged import off_plan
from fxquant.report.forecast import Operation, Place, absolute, expected_kernel, place_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site: what it is, why it is there, and whether a compiled graph has used it.

    Attributes:
        key: its name in the model; role: "weight", "activation" or "output"; spec: its format.
        operators: the operands that read it (``layer1.conv1.conv0.input``); for an output, whose result it is.
        kernels: for each of them, what its operator is expected to become on the target, or ``"float: …"`` and why.
        now: what it is in this stage of a `fxquant.Schedule` where that is not what the plan says, else "".
        shares: other sites on the same tensor; known where `explain` got inputs.
        range, status, reason, source: see `explain`.
    """

    key: str
    role: str
    spec: str
    now: str
    operators: tuple[str, ...]
    kernels: tuple[str, ...]
    shares: tuple[str, ...]
    range: str
    status: str
    reason: str
    source: str


def site_rows(
    model: nn.Module, plan: Plan, planned: Mapping[Place, Operation], shares: Mapping[str, tuple[str, ...]]
) -> tuple[Row, ...]:
    """A row for each site of the plan; ``shares`` has, by key, other sites on the same tensor."""
    held, status, staged = dict(quantizers(model)), _statuses(model), off_plan(model, plan)
    rows = []
    for site in plan.sites:
        edges = [absolute(site, edge) for edge in site.local.edges]
        kernels = (expected_kernel(planned[place_of(edge)], edge.operand, plan.target) for edge in edges)
        rows.append(
            Row(
                key=site.key,
                role=site.local.role,
                spec=str(site.local.spec),
                now=staged.get(site.key, ""),
                operators=tuple(map(str, edges)),
                kernels=tuple(kernels),
                shares=shares.get(site.key, ()),
                range=held[site.key].range.describe(held[site.key].state),
                status=status[site.owner],
                reason=site.reason,
                source=site.source,
            )
        )
    return tuple(rows)


def _statuses(model: nn.Module) -> dict[str, str]:
    """Owner path → status.

    Instances of a class share compiled graphs, so that a graph exists is not enough: a range that is set says
    that this instance ran. Owners without ranges are judged by those of the whole model, or by graphs if it has none.
    """
    digests = {digest for report in compile_reports() for digest in report.digests}
    held = {path: _telling(those) for path, _, those in owners(model)}
    ran = {path for path, those in held.items() if any(q.is_set() for q in those)}
    statuses = {}
    for path, bound in bound_forwards(model).items():
        if bound.python_runs:
            statuses[path] = "in Python"
            continue
        seen = path in ran if held[path] else bool(ran) or not any(held.values())
        statuses[path] = "eager" if bound.eager_runs else "compiled" if seen and bound.key in digests else "not yet run"
    return statuses


def _telling(held: QuantizerSet) -> list[Quantizer]:
    """Those of whose range one can tell whether it has seen data: it is unset at first."""
    stateful = [q for q in held.values() if isinstance(q, Quantizer) and q.stateful]
    return [q for q in stateful if not q.range.is_set(q.range.initial_state(q.spec))]
