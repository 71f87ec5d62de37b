"""The operators of a prepared model as a drawn graph: a layered layout of our own, written as SVG.

Layers by longest path, order within a layer by medians, places by least squares. Nothing in it depends on hashes:
the same model gives the same bytes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from fxquant.report.operators import Operator, Wire
from fxquant.targets.expected import FLOAT

# Okabe and Ito's colours, which the colour-blind tell apart.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#5e3c99")
_FLOAT = "#9a9a9a"
_INTEGER_BOX, _FLOAT_BOX = ("#e6f2ea", "#2f7d4f"), ("#ffffff", "#8a8a8a")
_BIG, _SMALL = 36.0, 18.0  # heights of boxes
_LETTER, _SMALL_LETTER = 7.6, 6.1  # mean widths at the two font sizes
_BETWEEN, _ABOVE = 22.0, 30.0  # room between boxes of a layer, and between layers
_STUB = 30.0  # length of the line that stands for a parameter
_MARGIN = 24.0
_SWEEPS = 12
_STYLE = """\
text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; font-size: 12px; fill: #222222 }
.kind { font-weight: bold } .small { font-size: 10px; fill: #555555; font-weight: normal }
.edge { fill: none; stroke-width: 1.3 }
.codes { stroke-width: 2.4 } .edge:hover, g:hover > .edge { stroke-width: 4.5 }"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a drawing says about a site: its format, which gives the colour, and the lines of its tooltip."""

    spec: str
    lines: tuple[str, ...]


@dataclass(kw_only=True)
class _Box:
    """A vertex of the layout: an operator, or (without one) the bend of an edge that passes a layer."""

    operator: Operator | None = None
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    left: float = 0.0  # room kept free on the left, for parameters
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Path:
    """An edge through the layers: its boxes from top to bottom, and the wire it is."""

    boxes: tuple[int, ...]
    wire: Wire


# ---------------------------------------------------------------- layout


def _size(operator: Operator) -> _Box:
    stubs = sum(wire.source is None for wire in operator.wires)
    if operator.role == "mover":
        return _Box(operator=operator, width=len(operator.label) * _SMALL_LETTER + 14, height=_SMALL)
    headline = len(operator.label) * _LETTER + len(_kernel(operator)) * _SMALL_LETTER
    width = max(headline, len(_path(operator)) * _SMALL_LETTER, 56.0) + 18
    return _Box(operator=operator, width=width, height=max(_BIG, 12.0 * stubs), left=_STUB if stubs else 0.0)


def _kernel(operator: Operator) -> str:
    """The kernel in words that fit into the box; empty where it reads no codes, or is another operator's."""
    kernel = operator.kernel.split(" + ")[0].split(" (")[0]
    return "" if not kernel or kernel.startswith(("part of ", FLOAT)) else f"\u00a0→ {kernel}"


def _path(operator: Operator) -> str:
    """The module, of a long path its end."""
    return operator.module if len(operator.module) <= 30 else f"…{operator.module[-29:]}"


def _layers(operators: Sequence[Operator]) -> list[int]:
    """Layer of each operator: one below the lowest that it reads; what reads nothing, just above its first reader."""
    layers: list[int] = []
    readers: dict[int, list[int]] = {}
    for number, one in enumerate(operators):
        sources = [wire.source for wire in one.wires if wire.source is not None]
        layers.append(1 + max((layers[s] for s in sources), default=-1))
        for source in sources:
            readers.setdefault(source, []).append(number)
    for number in range(len(operators)):
        reads = any(wire.source is not None for wire in operators[number].wires)
        if not reads and number in readers:
            layers[number] = min(layers[r] for r in readers[number]) - 1
    return layers


def _boxes(operators: Sequence[Operator]) -> tuple[list[_Box], list[_Path]]:
    """Every operator, with the bends of the edges that pass layers, and the edges."""
    boxes = [_size(one) for one in operators]
    for box, layer in zip(boxes, _layers(operators), strict=True):
        box.layer = layer
    paths = []
    bends: dict[tuple[int, int, str | None], int] = {}  # edges of one value and site share their way
    for number, one in enumerate(operators):
        for wire in one.wires:
            if wire.source is None:
                continue
            way = [wire.source]
            for layer in range(boxes[wire.source].layer + 1, boxes[number].layer):
                key = (wire.source, layer, wire.site)
                if key not in bends:
                    bends[key] = len(boxes)
                    boxes.append(_Box(layer=layer))
                way.append(bends[key])
            way.append(number)
            paths.append(_Path(tuple(way), wire))
    for upper, lower in dict.fromkeys(pair for path in paths for pair in itertools.pairwise(path.boxes)):
        boxes[upper].below.append(lower)
        boxes[lower].above.append(upper)
    return boxes, paths


def _order(boxes: list[_Box]) -> list[list[int]]:
    """The boxes of each layer from left to right: the order with the fewest crossings of several median sweeps."""
    rows: list[list[int]] = [[] for _ in range(1 + max((box.layer for box in boxes), default=-1))]
    for number, box in enumerate(boxes):
        rows[box.layer].append(number)
    best, fewest = [list(row) for row in rows], _crossings(boxes, rows)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows[1:] if down else reversed(rows[:-1]):
            at = {number: place for line in rows for place, number in enumerate(line)}
            keys = {n: _median([at[o] for o in (boxes[n].above if down else boxes[n].below)], at[n]) for n in row}
            row.sort(key=lambda n: (keys[n], at[n]))
        crossings = _crossings(boxes, rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _median(places: list[int], otherwise: int) -> float:
    places = sorted(places)
    middle = len(places) // 2
    if not places:
        return float(otherwise)
    return float(places[middle]) if len(places) % 2 else (places[middle - 1] + places[middle]) / 2


def _crossings(boxes: list[_Box], rows: list[list[int]]) -> int:
    count = 0
    for row, below in itertools.pairwise(rows):
        at = {number: place for place, number in enumerate(below)}
        ends: list[int] = []
        for number in row:
            targets = sorted(at[other] for other in boxes[number].below)
            count += sum(len(ends) - bisect.bisect_right(ends, target) for target in targets)
            for target in targets:
                bisect.insort(ends, target)
    return count


def _place(boxes: list[_Box], rows: list[list[int]]) -> None:
    """Sets x: each box as near to the middle of its neighbours as the others of its layer let it."""
    for row in rows:
        _settle(boxes, row, [0.0] * len(row))
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            wanted = []
            for number in row:
                box = boxes[number]
                near = (box.above if down else box.below) or [number]
                # Operators align with operators and bends with bends: a chain beside a long edge stays one line.
                near = [other for other in near if bool(boxes[other].operator) == bool(box.operator)] or near
                wanted.append(sum(boxes[other].x for other in near) / len(near))
            _settle(boxes, row, wanted)
    leftmost = min((box.x - box.width / 2 - box.left for box in boxes), default=0.0)
    for box in boxes:
        box.x += _MARGIN - leftmost


def _settle(boxes: list[_Box], row: list[int], wanted: list[float]) -> None:
    """Least squares to ``wanted`` under the room each box takes: pooling of adjacent violators."""
    offsets, offset = [], 0.0
    for place, number in enumerate(row):
        if place:
            before, box = boxes[row[place - 1]], boxes[number]
            offset += (before.width + box.width) / 2 + box.left + _BETWEEN
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # weighted sum, weight, members
    for place, number in enumerate(row):
        weight = 4.0 if boxes[number].operator else 1.0  # rather the edge gives way
        pool = ((wanted[place] - offsets[place]) * weight, weight, 1)
        while pools and pools[-1][0] / pools[-1][1] >= pool[0] / pool[1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    values = [total / weight for total, weight, members in pools for _ in range(members)]
    for place, number in enumerate(row):
        boxes[number].x = values[place] + offsets[place]


def _stack(boxes: list[_Box], rows: list[list[int]], top: float) -> float:
    """Sets y, layer below layer from ``top`` on; returns where the last ends."""
    for row in rows:
        height = max(boxes[number].height for number in row)
        for number in row:
            boxes[number].y = top + height / 2
            if boxes[number].operator is None:
                boxes[number].height = height  # an edge goes straight down beside the boxes of a layer
        top += height + _ABOVE
    return top - _ABOVE


# ---------------------------------------------------------------- SVG


class _Canvas:
    """The parts of a drawing in the making."""

    def __init__(self, shown: Mapping[str, Shown]) -> None:
        self.shown = shown
        formats = dict.fromkeys(one.spec for one in shown.values())
        self.colours = {spec: _PALETTE[i % len(_PALETTE)] for i, spec in enumerate(formats)}
        self.parts: list[str] = []
        self.width = 0.0

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle", rest: str = "") -> None:
        style = f' class="{kind}"' if kind else ""
        more = f'<tspan class="small">{escape(rest)}</tspan>' if rest else ""
        self.add(f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{style}>{escape(words)}{more}</text>')
        self.width = max(self.width, x + len(words) * _LETTER * (1.0 if anchor == "start" else 0.5))

    def colour(self, wire: Wire) -> str:
        return self.colours[self.shown[wire.site].spec] if wire.site else _FLOAT

    def edge(self, points: Sequence[tuple[float, float]], wire: Wire, about: str) -> None:
        """A polyline with a tip at its end; quantized ones carry their site and the edge of the plan."""
        colour, quantized = self.colour(wire), wire.site is not None
        data = f' data-site="{_quote(wire.site or "")}"' if quantized else ""
        data += f' data-edge="{_quote(wire.serves)}"' if wire.serves else ""
        lines = self.shown[wire.site].lines if wire.site else ("float",)
        line = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        kind = "edge codes" if quantized else "edge"
        self.add(f"<g{data}>{_title((*lines, about))}")
        self.add(f'<polyline class="{kind}" stroke="{colour}" points="{line}"/>')
        self.add(f'<path fill="{colour}" d="{_tip(points[-2], points[-1])}"/></g>')


def draw_svg(graphs: Sequence[Sequence[Operator]], shown: Mapping[str, Shown], title: str) -> str:
    """The graphs, one below the other, as an SVG document.

    Args:
        graphs: operators in execution order.
        shown: site key → what to say about it; every site that a wire names.
        title: the headline.
    """
    canvas = _Canvas(shown)
    bottom = _legend(canvas, title)
    for number, operators in enumerate(graphs):
        if number:
            canvas.text(_MARGIN, bottom + 8, f"graph {number + 1}, behind a graph break", "small", "start")
            bottom += 24
        bottom = _draw_graph(canvas, operators, bottom) + _ABOVE
    bottom = _absent(canvas, graphs, bottom)
    width, height = _n(canvas.width + _MARGIN), _n(bottom)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join((head, _title((title,)), f"<style>{_STYLE}</style>", _BACKGROUND, *canvas.parts, "</svg>\n"))


_BACKGROUND = '<rect width="100%" height="100%" fill="#ffffff"/>'


def _legend(canvas: _Canvas, title: str) -> float:
    canvas.text(_MARGIN, _MARGIN + 6, title, "kind", "start")
    y = _MARGIN + 28
    for spec, colour in (*canvas.colours.items(), ("float", _FLOAT)):
        stroke = 1.3 if spec == "float" else 2.4
        canvas.add(
            f'<line class="legend" x1="{_n(_MARGIN)}" y1="{_n(y)}" x2="{_n(_MARGIN + 28)}" y2="{_n(y)}"'
            f' stroke="{colour}" stroke-width="{stroke}"/>'
        )
        canvas.text(_MARGIN + 36, y + 4, spec, "small", "start")
        y += 16
    _dot(canvas, _MARGIN + 14, y, _FLOAT)
    canvas.text(_MARGIN + 36, y + 4, "parameter", "small", "start")
    y += 18
    for (fill, stroke_colour), words in ((_INTEGER_BOX, "expected on integers"), (_FLOAT_BOX, "in float")):
        canvas.add(
            f'<rect x="{_n(_MARGIN)}" y="{_n(y - 6)}" width="28" height="12" rx="3" fill="{fill}"'
            f' stroke="{stroke_colour}"/>'
        )
        canvas.text(_MARGIN + 36, y + 4, words, "small", "start")
        y += 18
    return y + 14


def _draw_graph(canvas: _Canvas, operators: Sequence[Operator], top: float) -> float:
    boxes, paths = _boxes(operators)
    rows = _order(boxes)
    _place(boxes, rows)
    bottom = _stack(boxes, rows, top)
    canvas.width = max(canvas.width, *(box.x + box.width / 2 for box in boxes), 0.0) if boxes else canvas.width
    for path, end in zip(paths, _ends(boxes, paths), strict=True):
        first, last = boxes[path.boxes[0]], boxes[path.boxes[-1]]
        points = [(first.x, first.y + first.height / 2)]
        for bend in (boxes[number] for number in path.boxes[1:-1]):
            points += [(bend.x, bend.y - bend.height / 2), (bend.x, bend.y + bend.height / 2)]
        points.append((end, last.y - last.height / 2))
        canvas.edge(points, path.wire, _about(first, last, path.wire))
    for box in boxes:
        if box.operator is not None:
            _draw_stubs(canvas, box)
            _draw_box(canvas, box)
    return bottom


def _ends(boxes: list[_Box], paths: list[_Path]) -> list[float]:
    """Where on the top of its box each edge ends: side by side, in the order in which they come in."""
    coming: dict[int, list[int]] = {}
    for number, path in enumerate(paths):
        coming.setdefault(path.boxes[-1], []).append(number)
    ends = [0.0] * len(paths)
    for target, numbers in coming.items():
        box = boxes[target]
        numbers.sort(key=lambda number: (boxes[paths[number].boxes[-2]].x, number))
        step = min(18.0, box.width * 0.7 / len(numbers))
        for place, number in enumerate(numbers):
            ends[number] = box.x + (place - (len(numbers) - 1) / 2) * step
    return ends


def _draw_stubs(canvas: _Canvas, box: _Box) -> None:
    """A parameter is a short line with a dot, on the left of who reads it."""
    assert box.operator is not None
    stubs = [wire for wire in box.operator.wires if wire.source is None]
    edge = box.x - box.width / 2
    for number, wire in enumerate(stubs):
        y = box.y + (number - (len(stubs) - 1) / 2) * 12
        canvas.edge(((edge - _STUB + 6, y), (edge, y)), wire, f"parameter → {_named(box.operator)}.{wire.operand}")
        _dot(canvas, edge - _STUB + 6, y, canvas.colour(wire))


def _dot(canvas: _Canvas, x: float, y: float, colour: str) -> None:
    canvas.add(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3.5" fill="{colour}"/>')


def _draw_box(canvas: _Canvas, box: _Box) -> None:
    one = box.operator
    assert one is not None
    # Of attention, one product may run on integers and the other not.
    fill, stroke = _INTEGER_BOX if one.kernel and not one.kernel.startswith(FLOAT) else _FLOAT_BOX
    lines = [f"{_named(one)}", *([f"expected: {one.kernel}"] if one.kernel else []), *one.declined]
    lines += [one.source] if one.source else []
    canvas.add(f'<g data-operator="{_quote(one.name)}">{_title(lines)}')
    radius = box.height / 2 if one.role in ("input", "output") else 5
    dashes = ' stroke-dasharray="3 2"' if one.role == "mover" else ""
    canvas.add(
        f'<rect x="{_n(box.x - box.width / 2)}" y="{_n(box.y - box.height / 2)}" width="{_n(box.width)}"'
        f' height="{_n(box.height)}" rx="{_n(radius)}" fill="{fill}" stroke="{stroke}"{dashes}/>'
    )
    if one.role == "mover":
        canvas.text(box.x, box.y + 3.5, one.label, "small")
    elif one.role != "operator":
        canvas.text(box.x, box.y + 4, one.label)
    else:
        canvas.text(box.x, box.y - 3 if one.module else box.y + 4, one.label, "kind", rest=_kernel(one))
        if one.module:
            canvas.text(box.x, box.y + 11, _path(one), "small")
    canvas.add("</g>")


def _absent(canvas: _Canvas, graphs: Sequence[Sequence[Operator]], top: float) -> float:
    """Names the sites that the example inputs did not reach."""
    drawn = {wire.site for graph in graphs for one in graph for wire in one.wires}
    absent = [key for key in canvas.shown if key not in drawn]
    if absent:
        canvas.text(_MARGIN, top, "sites that these inputs do not reach:", "small", "start")
        top += 16
    for key in absent:
        canvas.add(f'<g data-site="{_quote(key)}">{_title(canvas.shown[key].lines)}')
        canvas.text(_MARGIN + 12, top, f"{key}: {canvas.shown[key].spec}", "small", "start")
        canvas.add("</g>")
        top += 16
    return top


def _about(first: _Box, last: _Box, wire: Wire) -> str:
    assert first.operator is not None and last.operator is not None
    return f"{_named(first.operator)} → {_named(last.operator)}{'.' + wire.operand if wire.operand else ''}"


def _named(one: Operator) -> str:
    return f"{one.module}: {one.name}" if one.module else one.name if one.role == "operator" else one.label


def _title(lines: Sequence[str]) -> str:
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _tip(before: tuple[float, float], end: tuple[float, float]) -> str:
    """A triangle at the end of an edge, along its last stretch."""
    dx, dy = end[0] - before[0], end[1] - before[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    dx, dy = dx / length, dy / length
    base = (end[0] - 7 * dx, end[1] - 7 * dy)
    corners = (end, (base[0] - 3.2 * dy, base[1] + 3.2 * dx), (base[0] + 3.2 * dy, base[1] - 3.2 * dx))
    return "M " + " L ".join(f"{_n(x)} {_n(y)}" for x, y in corners) + " Z"


def _quote(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0").replace("-0.0", "0")
