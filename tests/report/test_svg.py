"""Parts of SVG: numbers, words, edges with tips."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fxquant.report.drawing import Shown, draw_svg
from fxquant.report.drawing.svg import FLOAT_COLOUR, Canvas, px, quote, title_element
from fxquant.report.operators import Operator, Wire

SHOWN = {
    "a.input": Shown(spec="u8", lines=("a.input: u8", "why")),
    "b.input": Shown(spec="s4 axis 0", lines=("b.input: s4",)),
    "c.input": Shown(spec="u8", lines=("c.input: u8",)),
}


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (1.25, "1.2"), (1.26, "1.3"), (-3.0, "-3"), (1234.56, "1234.6"), (-0.01, "0")]
)
def test_numbers_have_a_tenth_of_a_pixel(value: float, text: str) -> None:
    assert px(value) == text


def test_words_are_escaped_where_they_stand() -> None:
    assert quote('<"&>') == "&lt;&quot;&amp;&gt;"
    element = ElementTree.fromstring(title_element(("a < b", "c & d")))
    assert element.tag == "title" and element.text == "a < b\nc & d"


def test_one_colour_for_each_format_and_grey_for_float() -> None:
    canvas = Canvas(SHOWN)
    colours = [canvas.colour(Wire(operand="x", source=0, site=key)) for key in (*SHOWN, None)]
    assert colours[0] == colours[2] and len(set(colours)) == 3 and colours[3] == FLOAT_COLOUR
    assert list(canvas.colours) == ["u8", "s4 axis 0"]


def test_more_formats_than_colours_begin_again() -> None:
    shown = {str(i): Shown(spec=f"s{i}", lines=()) for i in range(20)}
    colours = list(Canvas(shown).colours.values())
    assert len(colours) == 20 and colours[0] == colours[8] and len(set(colours[:8])) == 8


def test_the_page_grows_with_its_words() -> None:
    canvas = Canvas({})
    canvas.text(10, 5, "w" * 10, anchor="start")
    wide = canvas.width
    assert wide > 10 + 10 * 5
    canvas.text(10, 5, "w" * 10)
    assert canvas.width == wide, "centred words reach half as far"
    assert all(ElementTree.fromstring(part).text == "w" * 10 for part in canvas.parts)


@pytest.mark.parametrize(
    "wire",
    [Wire(operand="input", source=0, site="a.input", serves="a.conv0.input"), Wire(operand="", source=0)],
    ids=["codes", "float"],
)
def test_an_edge_says_what_it_carries(wire: Wire) -> None:
    canvas = Canvas(SHOWN)
    canvas.edge(((0, 0), (0, 10), (5, 20)), wire, "x → y")
    group = ElementTree.fromstring("".join(canvas.parts))
    line, title = group.find("polyline"), group.findtext("title")
    assert line is not None and line.attrib["points"] == "0,0 0,10 5,20" and title is not None
    assert title.split("\n")[-1] == "x → y"
    if wire.site:
        assert group.attrib == {"data-site": "a.input", "data-edge": "a.conv0.input"}
        assert line.attrib["class"] == "edge codes" and title.startswith("a.input: u8\nwhy\n")
    else:
        assert group.attrib == {} and line.attrib["class"] == "edge" and title.startswith("float\n")


@pytest.mark.parametrize("end", [(0, 20), (20, 0), (15, 15), (-9, 4), (0, 0)], ids=str)
def test_the_tip_points_along_the_last_stretch(end: tuple[float, float]) -> None:
    canvas = Canvas({})
    canvas.edge(((0, 0), end), Wire(operand="", source=0), "")
    path = ElementTree.fromstring("".join(canvas.parts)).find("path")
    assert path is not None
    numbers = list(map(float, re.findall(r"-?\d+(?:\.\d+)?", path.attrib["d"])))
    (tip, left, right) = zip(numbers[::2], numbers[1::2], strict=True)
    assert tip == pytest.approx(end, abs=0.05)
    if end != (0, 0):
        base = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2)
        assert math.dist(base, end) == pytest.approx(7, abs=0.2) and math.dist(left, right) == pytest.approx(
            6.4, abs=0.2
        )
        assert math.dist(base, (0, 0)) < math.dist(end, (0, 0)), "the base lies before the end"


def chain(kernel: str) -> list[Operator]:
    return [
        Operator(role="input", label="x", name="x"),
        Operator(role="mover", label="view", name="view", wires=(Wire(operand="", source=0),)),
        Operator(
            role="operator",
            label="linear",
            name="linear",
            module="fc",
            kernel=kernel,
            declined=("its output: why",),
            wires=(Wire(operand="input", source=1, site="a.input"), Wire(operand="weight", source=None)),
        ),
        Operator(role="output", label="output", name="output", wires=(Wire(operand="", source=2),)),
    ]


@pytest.mark.parametrize(("kernel", "integer"), [("QGemm", True), ("float: why", False), ("", False)])
def test_boxes_of_integer_operators_are_filled(kernel: str, integer: bool) -> None:
    root = ElementTree.fromstring(draw_svg([chain(kernel)], SHOWN, "title"))
    groups = {g.get("data-operator"): g for g in root.iter() if g.get("data-operator")}
    rect = groups["linear"].find("{*}rect")
    assert rect is not None and (rect.attrib["fill"] != "#ffffff") is integer
    title = groups["linear"].findtext("{*}title") or ""
    assert title.startswith("fc: linear") and title.endswith("its output: why")
    assert (f"expected: {kernel}" in title) is bool(kernel)


def test_the_document_names_what_no_graph_shows() -> None:
    root = ElementTree.fromstring(draw_svg([chain("")] * 2, SHOWN, "title"))
    texts = [text.text for text in root.iter("{*}text")] or [
        text.text for text in root.iter() if text.tag.endswith("text")
    ]
    assert "graph 2, after a graph break" in texts
    assert texts[-3:] == ["sites that these inputs do not reach:", "b.input: s4 axis 0", "c.input: u8"]
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert root.attrib["viewBox"] == f"0 0 {px(width)} {px(height)}"
