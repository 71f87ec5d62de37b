"""What a prepared model is, on one page for a browser: the plan as a graph, every site, what stays float, what ran."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.onnx.verify_report import VerifyReport
from fxquant.report.coverage import HEADER
from fxquant.report.explanation import Explanation, explain
from fxquant.report.site_rows import Row
from fxquant.report.sqnr import sqnr
from fxquant.support.table import short

_CLEAR = 60.0  # dB at which a bar is full: more than 8 bits give

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5f6368; --line: #d9dce1; --page: #fbfbfc; --card: #ffffff;
  --bar: #0072b2; --bad: #b3261e; --good: #2f7d4f }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a0a4ab; --line: #3a3d42; --page: #17181a;
  --card: #202225; --bar: #56b4e9; --bad: #ff8a80; --good: #7bd3a0 } }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem } p { margin: .2rem 0 }
.soft { color: var(--soft) } .cards { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: 1.2rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem;
  min-width: 8rem; max-width: 16rem; overflow-wrap: anywhere }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums } .card span { color: var(--soft) }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
.graph { background: #ffffff; max-height: 45rem; overflow: auto; text-align: center }
table { border-collapse: collapse; width: 100%; font-size: .9rem } td, th { padding: .35rem .7rem; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
tr:last-child td { border-bottom: 0 } td:first-child { font-family: ui-monospace, 'DejaVu Sans Mono', monospace }
.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { display: inline-block; height: .55rem; border-radius: .2rem; background: var(--bar); margin-right: .5rem }
.good { color: var(--good) } .bad { color: var(--bad) }
"""

Cell = str  # HTML


def html(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    verified: VerifyReport | None = None,
) -> None:
    """Writes a page about a prepared model: one file that needs no network, for light and dark screens.

    The plan as a graph (`Explanation.draw`), the share of the compute on quantized operands, every site with its range
    and its signal to quantization noise on ``args`` (`sqnr`), what stays float and why; with ``verified``, what
    `verify_onnx` gave, the kernel of each product, codes that differ and the latency too.

    Args:
        model: prepared; a range that is not set yet is that of ``args``. It runs twice on them, and stays as it was.
        args: example inputs; ``kwargs``: keyword ones.
        path: where to write, ends in ``.html``.

    Raises InvalidArgument for an unprepared model, inputs that it cannot run on, and another ending.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InvalidArgument(f"path must end in .html: got {os.fspath(path)!r}. A page for browsers is written.")
    if not Path(path).parent.is_dir():
        raise InvalidArgument(f"path must be in a folder that is there: got {os.fspath(path)!r}. Make it first.")
    found = explain(model, args, kwargs)
    noise = sqnr(model, args, kwargs)
    Path(path).write_text(_page(found, noise, verified), encoding="utf-8")


def _page(found: Explanation, noise: Mapping[str, float], verified: VerifyReport | None) -> str:
    title = f"{found.plan.recipe} for {found.plan.target}"
    parts = [_cards(found, noise, verified), _section("Graph", f'<div class="wide graph">{found.svg()}</div>')]
    parts.append(_section("Sites", _table(_SITES, (_site(row, noise) for row in found.rows))))
    if found.coverage is not None and found.coverage.most_float():
        parts.append(
            _section("Most work in float", _table(HEADER, (map(escape, row) for row in found.coverage.cells())))
        )
    if found.declined:
        left = ([escape(d.where), escape(d.reason), escape(short(d.source))] for d in found.declined)
        parts.append(_section("Left in float", _table(("operator", "why", "source"), left)))
    if verified is not None:
        parts += _proof(verified)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title>"
    about = f'<p class="soft">{escape(found.stage)}</p>' if found.stage else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>{about}\n" + "\n".join(parts) + "\n</body></html>\n"
    )


_SITES = ("site", "format", "range", "SQNR", "expected kernel", "why", "source")


def _site(row: Row, noise: Mapping[str, float]) -> Sequence[Cell]:
    kernels = "; ".join(dict.fromkeys(row.kernels))
    return [
        *map(escape, (row.key, row.spec, row.range)),
        _bar(noise.get(row.key)),
        *map(escape, (kernels, row.reason, short(row.source))),
    ]


def _bar(value: float | None) -> Cell:
    if value is None:
        return '<span class="soft">not run</span>'
    if math.isinf(value):
        return "exact"
    width = 6 * min(1.0, max(0.0, value / _CLEAR))
    return f'<span class="number"><span class="bar" style="width:{width:.2f}rem"></span>{value:.1f} dB</span>'


def _cards(found: Explanation, noise: Mapping[str, float], verified: VerifyReport | None) -> str:
    facts = [(str(len(found.rows)), "sites")]
    if found.coverage is not None and found.coverage.flops:
        facts.append((f"{100 * found.coverage.share:.3g} %", "of the compute on quantized operands"))
    finite = {key: value for key, value in noise.items() if math.isfinite(value)}
    if finite:
        worst = min(finite, key=finite.__getitem__)
        facts.append((f"{finite[worst]:.1f} dB", f"lowest SQNR: {worst}"))
    if verified is not None and verified.rows:
        facts.append((f"{sum(row.integer for row in verified.rows)} of {len(verified.rows)}", "products on integers"))
    if verified is not None and verified.compared_codes:
        facts.append((f"{verified.differing_codes:,} of {verified.compared_codes:,}", "codes differ from training's"))
    if verified is not None and verified.latency > 0 and verified.float_latency > 0:
        facts.append((f"{verified.latency / verified.float_latency:.2f}", "of the float file's time"))
    cards = (f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in facts)
    return f'<div class="cards">{"".join(cards)}</div>'


def _proof(verified: VerifyReport) -> list[str]:
    rows = (
        [
            *map(escape, (row.name, row.op_type, row.kernel)),
            '<span class="good">yes</span>' if row.integer else '<span class="bad">no</span>',
            escape(row.reason or ""),
        ]
        for row in verified.rows
    )
    where = verified.runtime or "no runtime"
    parts = [_section(f"Products in {where}", _table(("node", "operator", "kernel", "integer", "why not"), rows))]
    moved = [row for row in verified.codes if row.differing]
    if moved:
        cells = ([escape(row.key), f"{row.differing:,}", f"{row.compared:,}", str(row.largest)] for row in moved)
        parts.append(_section("Codes that differ", _table(("site", "differ", "of", "largest"), cells)))
    return parts


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _table(header: Sequence[str], rows: Iterable[Iterable[Cell]]) -> str:
    """Rows of cells that are HTML; the header is text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
