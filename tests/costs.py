"""Tables of costs made by hand."""

from __future__ import annotations

from collections.abc import Mapping

from fxquant.targets.costs import EDGES, Cost, CostTable, Line, Row, Size

CHEAP = dict.fromkeys(EDGES, 1.0)


def table_of(
    layers: Mapping[Size, tuple[float, float]], lines: Mapping[str, float] = CHEAP, each: float = 0.0
) -> CostTable:
    """Of layers as integers and in float, and changes of form, with ``each`` for a thousand numbers on top."""
    edges = {name: Line(fixed=lines[name], each=each) for name in EDGES}
    return CostTable(
        target="onnxruntime",
        version="1.0",
        cpu="x86_64-vnni",
        machine="a CPU",
        date="2026-11-30",
        threads=1,
        rows=tuple(Row(size=size, cost=Cost(integer=i, plain=f)) for size, (i, f) in layers.items()),
        edges={"conv": edges, "product": edges},
    )
