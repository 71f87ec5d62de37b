"""The SVG document: a legend, the graphs, and what is in none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxquant.report.drawing.box import STUB, Box, kernel_words, module_words
from fxquant.report.drawing.coordinates import ABOVE, MARGIN, edge_ends, set_columns, set_heights
from fxquant.report.drawing.layers import boxes_and_paths, rows_in_order
from fxquant.report.drawing.svg import FLOAT_COLOUR, Canvas, Shown, px, quote, title_element
from fxquant.report.operators import Operator, Wire
from fxquant.targets.expected import FLOAT

_INTEGER_BOX, _FLOAT_BOX = ("#e6f2ea", "#2f7d4f"), ("#ffffff", "#8a8a8a")
_BACKGROUND = '<rect width="100%" height="100%" fill="#ffffff"/>'
_STYLE = """\
text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; font-size: 12px; fill: #222222 }
.kind { font-weight: bold } .small { font-size: 10px; fill: #555555; font-weight: normal }
.edge { fill: none; stroke-width: 1.3 }
.codes { stroke-width: 2.4 } .edge:hover, g:hover > .edge { stroke-width: 4.5 }"""


def draw_svg(graphs: Sequence[Sequence[Operator]], shown: Mapping[str, Shown], title: str) -> str:
    """The graphs, one below the other, as an SVG document.

    Args:
        graphs: operators in execution order.
        shown: site key → what to say about it; every site that a wire names.
        title: the headline.
    """
    canvas = Canvas(shown)
    bottom = _legend(canvas, title)
    for number, operators in enumerate(graphs):
        if number:
            canvas.text(MARGIN, bottom + 8, f"graph {number + 1}, after a graph break", "small", "start")
            bottom += 24
        bottom = _draw_graph(canvas, operators, bottom) + ABOVE
    bottom = _absent(canvas, graphs, bottom)
    width, height = px(canvas.width + MARGIN), px(bottom)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    opening = (head, title_element((title,)), f"<style>{_STYLE}</style>", _BACKGROUND)
    return "\n".join((*opening, *canvas.parts, "</svg>\n"))


def _legend(canvas: Canvas, title: str) -> float:
    canvas.text(MARGIN, MARGIN + 6, title, "kind", "start")
    y = MARGIN + 28
    for spec, colour in (*canvas.colours.items(), ("float", FLOAT_COLOUR)):
        stroke = 1.3 if spec == "float" else 2.4
        canvas.add(
            f'<line class="legend" x1="{px(MARGIN)}" y1="{px(y)}" x2="{px(MARGIN + 28)}" y2="{px(y)}"'
            f' stroke="{colour}" stroke-width="{stroke}"/>'
        )
        canvas.text(MARGIN + 36, y + 4, spec, "small", "start")
        y += 16
    _dot(canvas, MARGIN + 14, y, FLOAT_COLOUR)
    canvas.text(MARGIN + 36, y + 4, "parameter", "small", "start")
    y += 18
    for (fill, stroke_colour), words in ((_INTEGER_BOX, "expected on integers"), (_FLOAT_BOX, "in float")):
        canvas.add(
            f'<rect x="{px(MARGIN)}" y="{px(y - 6)}" width="28" height="12" rx="3" fill="{fill}"'
            f' stroke="{stroke_colour}"/>'
        )
        canvas.text(MARGIN + 36, y + 4, words, "small", "start")
        y += 18
    return y + 14


def _draw_graph(canvas: Canvas, operators: Sequence[Operator], top: float) -> float:
    boxes, paths = boxes_and_paths(operators)
    rows = rows_in_order(boxes)
    set_columns(boxes, rows)
    bottom = set_heights(boxes, rows, top)
    canvas.width = max(canvas.width, *(box.x + box.width / 2 for box in boxes), 0.0) if boxes else canvas.width
    for path, end in zip(paths, edge_ends(boxes, paths), strict=True):
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


def _draw_stubs(canvas: Canvas, box: Box) -> None:
    """A parameter is a short line with a dot, on the left of who reads it."""
    assert box.operator is not None
    stubs = [wire for wire in box.operator.wires if wire.source is None]
    edge = box.x - box.width / 2
    for number, wire in enumerate(stubs):
        y = box.y + (number - (len(stubs) - 1) / 2) * 12
        canvas.edge(((edge - STUB + 6, y), (edge, y)), wire, f"parameter → {_named(box.operator)}.{wire.operand}")
        _dot(canvas, edge - STUB + 6, y, canvas.colour(wire))


def _dot(canvas: Canvas, x: float, y: float, colour: str) -> None:
    canvas.add(f'<circle cx="{px(x)}" cy="{px(y)}" r="3.5" fill="{colour}"/>')


def _draw_box(canvas: Canvas, box: Box) -> None:
    one = box.operator
    assert one is not None
    # Of attention, one product may run on integers and the other not.
    fill, stroke = _INTEGER_BOX if one.kernel and not one.kernel.startswith(FLOAT) else _FLOAT_BOX
    lines = [f"{_named(one)}", *([f"expected: {one.kernel}"] if one.kernel else []), *one.declined]
    lines += [one.source] if one.source else []
    canvas.add(f'<g data-operator="{quote(one.name)}">{title_element(lines)}')
    radius = box.height / 2 if one.role in ("input", "output") else 5
    dashes = ' stroke-dasharray="3 2"' if one.role == "mover" else ""
    canvas.add(
        f'<rect x="{px(box.x - box.width / 2)}" y="{px(box.y - box.height / 2)}" width="{px(box.width)}"'
        f' height="{px(box.height)}" rx="{px(radius)}" fill="{fill}" stroke="{stroke}"{dashes}/>'
    )
    if one.role == "mover":
        canvas.text(box.x, box.y + 3.5, one.label, "small")
    elif one.role != "operator":
        canvas.text(box.x, box.y + 4, one.label)
    else:
        canvas.text(box.x, box.y - 3 if one.module else box.y + 4, one.label, "kind", rest=kernel_words(one))
        if one.module:
            canvas.text(box.x, box.y + 11, module_words(one), "small")
    canvas.add("</g>")


def _absent(canvas: Canvas, graphs: Sequence[Sequence[Operator]], top: float) -> float:
    """Names the sites that the example inputs did not reach."""
    drawn = {wire.site for graph in graphs for one in graph for wire in one.wires}
    absent = [key for key in canvas.shown if key not in drawn]
    if absent:
        canvas.text(MARGIN, top, "sites that these inputs do not reach:", "small", "start")
        top += 16
    for key in absent:
        canvas.add(f'<g data-site="{quote(key)}">{title_element(canvas.shown[key].lines)}')
        canvas.text(MARGIN + 12, top, f"{key}: {canvas.shown[key].spec}", "small", "start")
        canvas.add("</g>")
        top += 16
    return top


def _about(first: Box, last: Box, wire: Wire) -> str:
    assert first.operator is not None and last.operator is not None
    return f"{_named(first.operator)} → {_named(last.operator)}{'.' + wire.operand if wire.operand else ''}"


def _named(one: Operator) -> str:
    return f"{one.module}: {one.name}" if one.module else one.name if one.role == "operator" else one.label
