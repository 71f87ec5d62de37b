"""`explain`: every site of a prepared model, and what was left in float."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.backend.reports import CompileReport, compile_reports
from fxquant.errors import InvalidArgument
from fxquant.plan.plan import FloatPlace, Plan
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.root import require_plan, stage_of, unwrap
from fxquant.report.coverage import HEADER, Coverage, coverage
from fxquant.report.drawing import Shown, draw_svg
from fxquant.report.example_run import ExampleRun, run_on_examples
from fxquant.report.forecast import Operation, Place, expected_kernel, operations
from fxquant.report.operators import Operator
from fxquant.report.site_rows import Row, site_rows
from fxquant.spec.ranges.base import UNSET
from fxquant.support.table import short, table
from fxquant.targets.expected import FLOAT

_WIDTH = 120  # of the printed tables
_LINES = 3  # that a cell of them may take


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found; prints as tables, and draws where `explain` was given example inputs.

    ``coverage`` says how much of the compute reads quantized operands; None without example inputs. ``eager_cuda`` says
    what eager ops on CUDA tensors run on; None where there is no CUDA and `fxquant.kernels.using` was not asked.
    ``stage`` says where a `fxquant.Schedule` is, "" without one.
    """

    plan: Plan
    rows: tuple[Row, ...]
    declined: tuple[FloatPlace, ...]
    compile_declines: tuple[str, ...]
    coverage: Coverage | None = None
    graphs: tuple[tuple[Operator, ...], ...] | None = field(default=None, repr=False)
    eager_cuda: str | None = None
    stage: str = ""

    @property
    def unbound(self) -> tuple[str, ...]:
        """Sites that no compiled graph has used, or whose module ran in eager Python instead."""
        return tuple(row.key for row in self.rows if row.status in ("eager", "not yet run"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nothing shortened."""
        return {
            "recipe": self.plan.recipe,
            "target": self.plan.target,
            "stage": self.stage,
            "sites": [vars(row) for row in self.rows],
            "declined": [vars(d) for d in self.declined],
            "compile_declines": list(self.compile_declines),
            "unbound": list(self.unbound),
            "coverage": self.coverage.to_dict() if self.coverage else None,
            "eager_cuda": self.eager_cuda,
        }

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Writes the model's operators as an SVG graph: edges coloured by format, with the sites as tooltips.

        Raises InvalidArgument where `explain` was not given example inputs, or ``path`` does not end in ``.svg``.
        """
        if Path(path).suffix.lower() != ".svg":
            raise InvalidArgument(f"path must end in .svg: got {os.fspath(path)!r}. Only SVG is drawn.")
        Path(path).write_text(self.svg(), encoding="utf-8")

    def svg(self) -> str:
        """That graph as text. Raises InvalidArgument where `explain` was not given example inputs."""
        if self.graphs is None:
            raise InvalidArgument(
                "explain must be given example inputs to draw: got none. Write fxquant.explain(model, (x,)).draw(path)."
            )
        shown = {row.key: Shown(spec=row.spec, lines=_tooltip(row)) for row in self.rows}
        title = f"recipe {self.plan.recipe!r} for {self.plan.target}"
        return draw_svg(self.graphs, shown, title)

    def __str__(self) -> str:
        head = f"recipe {self.plan.recipe!r} for {self.plan.target}: {len(self.rows)} sites"
        statuses = {row.status for row in self.rows}
        # What is the same everywhere is said once, and ranges not at all before there are any.
        dropped = {"status"} if len(statuses) == 1 else set()
        keep = {site.key for site in self.plan.sites if site.local.spec.range.stateful}
        dropped |= set() if any(row.key in keep and row.range != UNSET for row in self.rows) else {"range"}
        dropped |= set() if any(row.now for row in self.rows) else {"now"}
        head += f", all {statuses.pop()}" if dropped & {"status"} else ""
        header = ["site", "format", "now", "range", "status", "expected kernel", "why", "source"]
        rows = [
            [r.key, r.spec, r.now, r.range, r.status, "; ".join(dict.fromkeys(r.kernels)), _why(r), short(r.source)]
            for r in self.rows
        ]
        kept = [i for i, name in enumerate(header) if name not in dropped]
        header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
        parts = [head, *([self.stage] if self.stage else []), *([self.coverage.summary] if self.coverage else [])]
        parts.append(_wrapped(header, rows, ("expected kernel", "why")))
        if self.coverage and self.coverage.most_float():
            parts += ["", _wrapped(HEADER, self.coverage.cells(), ("why",))]
        if self.declined:
            parts.append(f"\nleft in float: {len(self.declined)}")
            left = [[d.where, d.reason, short(d.source)] for d in self.declined]
            parts.append(_wrapped(["operator", "why", "source"], left, ("why",)))
        if self.compile_declines:
            parts.append("\nin compiled graphs:")
            parts += self.compile_declines
        if self.eager_cuda:
            parts += ["", self.eager_cuda]
        return "\n".join(parts)


def explain(
    model: nn.Module, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None
) -> Explanation:
    """Every site of a prepared model with its reason, range and status, and every place left in float.

    Status: ``compiled`` once a compiled graph bound the site's owner; ``eager`` if Dynamo left the owner's frame
    in Python, where it runs in float; ``in Python`` for recurrent layers, which run quantized there; ``not yet run``
    before the first compiled step.

    Args:
        model: prepared, maybe compiled.
        args: example inputs, a tuple; ``kwargs``: keyword ones. With them the model runs once, in float, and its
            graphs say more: `Explanation.draw`, `Explanation.coverage`, which sites quantize one tensor, which
            results are quantized.

    Raises InvalidArgument for an unprepared model, and for inputs that it cannot run on.
    """
    plan = require_plan(model, "explain")
    model = unwrap(model)
    given = args is not None or kwargs is not None
    captured = run_on_examples(model, plan, () if args is None else args, kwargs) if given else None
    planned = operations(plan, captured.results, captured.served) if captured else operations(plan)
    declines = dict.fromkeys(str(decline) for report in _compiles_of(model, plan) for decline in report.declines)
    return Explanation(
        plan=plan,
        rows=site_rows(model, plan, planned, captured.same_tensor if captured else {}),
        declined=plan.declined,
        coverage=coverage(captured, plan) if captured else None,
        compile_declines=tuple(declines),
        graphs=_graphs(captured, planned, plan.target),
        eager_cuda=_eager_cuda(),
        stage=stage_of(model),
    )


def _compiles_of(model: nn.Module, plan: Plan) -> list[CompileReport]:
    """Reports of this model's compiles, and of those that others with its plan share with it.

    A layer is known by its site list, which layers of other models have too: a graph that reads no parameter of a
    prepared model counts if it holds no other layers than the model's.
    """
    own, keys = plan.digest(), {bound.key for bound in bound_forwards(model).values()}

    def is_own(report: CompileReport) -> bool:
        return own in report.plans if report.plans else bool(report.digests) and keys >= set(report.digests)

    return list(filter(is_own, compile_reports()))


def _eager_cuda() -> str | None:
    from fxquant.kernels import dispatch  # loaded by nothing else where there is no CUDA tensor

    if not (torch.cuda.is_available() or dispatch.asked_for()):
        return None
    return str(dispatch.status(build=False))


def _graphs(
    captured: ExampleRun | None, planned: Mapping[Place, Operation], target: str
) -> tuple[tuple[Operator, ...], ...] | None:
    """The graphs, each operator of the plan with what it is expected to become."""
    if captured is None:
        return None
    kernels = {}
    for place, operation in planned.items():
        parts = dict.fromkeys(expected_kernel(operation, operand, target) for operand in operation.sites)
        kernels[place] = " + ".join(parts)

    def kernel(one: Operator) -> str:
        if one.place in kernels:
            return kernels[one.place]
        head = kernels.get(one.head, FLOAT) if one.head else FLOAT
        return "" if head.startswith(FLOAT) else f"part of {head}"

    return tuple(tuple(dataclasses.replace(one, kernel=kernel(one)) for one in graph) for graph in captured.graphs)


def _why(row: Row) -> str:
    return row.reason + (f"; shares with {', '.join(row.shares)}" if row.shares else "")


def _tooltip(row: Row) -> tuple[str, ...]:
    lines = [f"{row.key}: {row.spec}", row.reason]
    lines += [f"range {row.range}"] if row.range else []
    lines += [f"shares with {', '.join(row.shares)}"] if row.shares else []
    return (*lines, *([row.source] if row.source else []))


def _wrapped(header: Sequence[str], rows: Sequence[Sequence[str]], flexible: Sequence[str]) -> str:
    """A table whose ``flexible`` columns are wrapped so that all fits the page, as far as the others let it."""
    columns = [header.index(name) for name in flexible]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    room = _WIDTH - 2 * (len(header) - 1) - sum(w for i, w in enumerate(widths) if i not in columns)
    for number, column in enumerate(columns):
        fair = room // (len(columns) - number)
        later = sum(widths[c] for c in columns[number + 1 :])
        # What the columns after it do not need is this one's.
        words = [len(word) for row in rows for word in row[column].split()]
        least = min(32, max(words, default=0))
        widths[column] = min(widths[column], max(fair, room - later, least))
        room -= widths[column]
    lines: list[list[str]] = []
    for row in rows:
        cells = [_cell(text, widths[i]) if i in columns else [text] for i, text in enumerate(row)]
        for number in range(max(map(len, cells))):
            lines.append([cell[number] if number < len(cell) else "" for cell in cells])
    return table(header, lines)


def _cell(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, max_lines=_LINES, placeholder=" …", break_on_hyphens=False) or [""]
