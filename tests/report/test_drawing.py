"""The drawn graph: what must be in it, read back with an XML parser."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.errors import InvalidArgument
from fxquant.prepared.bound_forward import bound_forward
from fxquant.report import Explanation
from fxquant.report.drawing import draw_svg
from fxquant.report.forecast import absolute
from fxquant.report.operators import Operator, Wire
from tests.processes import under_another_hash_seed
from tests.report.nets import FLAT, IMAGE, MAPS, TOKENS, Forked, Products, Repeated, Residual

SVG = "{http://www.w3.org/2000/svg}"
MIXED = [
    fxquant.Rule(path="b", operand="weight", spec=fxquant.QuantSpec(bits=4, axis=0, range=fxquant.CurrentTensor()))
]
CASES: dict[str, tuple[type[nn.Module], Tensor, dict[str, Any]]] = {
    "convolutions": (Residual, IMAGE, {}),
    "convolutions for tensorrt": (Residual, IMAGE, {"target": "tensorrt"}),
    "a layer left out": (Residual, IMAGE, {"rules": [fxquant.skip("stem")]}),
    "products": (Products, TOKENS, {}),
    "two formats": (Forked, FLAT, {"rules": MIXED}),
}


def explained(case: str) -> Explanation:
    net, x, options = CASES[case]
    return fxquant.explain(fxquant.prepare(net(), (x,), **options), (x,))


def drawn(found: Explanation, folder: Path) -> ElementTree.Element:
    found.draw(folder / "graph.svg")
    return ElementTree.parse(folder / "graph.svg").getroot()


def marked(root: ElementTree.Element, name: str) -> list[str]:
    return [group.attrib[name] for group in root.iter(f"{SVG}g") if name in group.attrib]


@pytest.mark.parametrize("case", CASES)
def test_every_site_and_every_edge_of_the_plan_is_drawn_once(case: str, tmp_path: Path) -> None:
    found = explained(case)
    root = drawn(found, tmp_path)
    edges = [str(absolute(s, e)) for s in found.plan.sites if s.local.role != "output" for e in s.local.edges]
    assert sorted(marked(root, "data-edge")) == sorted(edges)
    assert set(marked(root, "data-site")) == {row.key for row in found.rows}


@pytest.mark.parametrize("case", CASES)
def test_edges_have_the_colour_that_the_legend_gives_their_format(case: str, tmp_path: Path) -> None:
    found = explained(case)
    root = drawn(found, tmp_path)
    texts = [text.text for text in root.findall(f"{SVG}text")]
    formats = list(dict.fromkeys(row.spec for row in found.rows))
    start = texts.index(formats[0])
    assert texts[start : start + len(formats) + 1] == [*formats, "float"]
    lines = [line.attrib["stroke"] for line in root.findall(f"{SVG}line") if line.get("class") == "legend"]
    colours = dict(zip([*formats, "float"], lines, strict=True))
    assert len(set(lines)) == len(lines)
    spec = {row.key: row.spec for row in found.rows}
    for group in root.iter(f"{SVG}g"):
        for line in group.findall(f"{SVG}polyline"):
            key = group.get("data-site")
            assert line.attrib["stroke"] == colours[spec[key] if key else "float"]


def test_a_tooltip_says_what_the_site_is(tmp_path: Path) -> None:
    root = drawn(explained("convolutions"), tmp_path)
    (group,) = [g for g in root.iter(f"{SVG}g") if g.get("data-edge") == "mix.conv0.weight"]
    title = group.findtext(f"{SVG}title") or ""
    key, reason, range_, source, ends = title.split("\n")
    assert (key, reason, range_) == ("mix.weight: s8 axis 0", "weight of conv2d_2", "range of the tensor")
    line = Residual.forward.__code__.co_firstlineno + 3
    assert source.endswith(f"nets.py:{line}") and ends == "parameter → mix: conv2d_2.weight"


def test_a_tooltip_says_why_an_operator_stayed_float(tmp_path: Path) -> None:
    root = drawn(explained("a layer left out"), tmp_path)
    (group,) = [g for g in root.iter(f"{SVG}g") if g.get("data-operator") == "conv2d"]
    assert "Rule(path='stem', spec=None)" in (group.findtext(f"{SVG}title") or "")
    rest = {
        g.attrib["data-operator"]: g.findtext(f"{SVG}title") or ""
        for g in root.iter(f"{SVG}g")
        if g.get("data-operator")
    }
    assert "expected: part of QLinearAdd" in rest["relu_1"] and "expected" not in rest["relu"]


def test_boxes_do_not_overlap_and_lie_on_the_page(tmp_path: Path) -> None:
    root = drawn(explained("products"), tmp_path)
    boxes = []
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        if rect is not None:
            boxes.append(tuple(float(rect.attrib[name]) for name in ("x", "y", "width", "height")))
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)


def test_graph_breaks_and_what_the_inputs_do_not_reach(tmp_path: Path) -> None:
    model = fxquant.prepare(Repeated(), (MAPS,))
    root = drawn(fxquant.explain(model, (MAPS,), {"extra": False}), tmp_path)
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert "graph 2, after a graph break" in texts and "sites that these inputs do not reach:" in texts
    shown = [
        text.text for g in root.iter(f"{SVG}g") if "data-operator" not in g.attrib for text in g.findall(f"{SVG}text")
    ]
    assert shown == ["extra.input: u8", "extra.weight: s8 axis 0"]
    # The weight serves two calls of its module.
    assert marked(root, "data-site").count("conv.weight") == 2


def draw_residual(path: str) -> None:
    torch.manual_seed(0)
    fxquant.explain(fxquant.prepare(Residual(), (IMAGE,)), (IMAGE,)).draw(path)


def test_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    here, there = (str(tmp_path / f"{name}.svg") for name in ("here", "there"))
    code = "import sys; from tests.report.test_drawing import draw_residual; draw_residual(sys.argv[1])"
    under_another_hash_seed(code, there)
    torch._dynamo.reset()
    draw_residual(here)
    assert Path(here).read_bytes() == Path(there).read_bytes()


def test_words_are_escaped() -> None:
    one = Operator(role="operator", label="<a&b>", name='"<n>"', wires=(Wire(operand="x", source=None),))
    root = ElementTree.fromstring(draw_svg([[one]], {}, "<&>"))
    assert marked(root, "data-operator") == ['"<n>"']
    assert root.findtext(f"{SVG}title") == "<&>"


def test_no_graph_at_all() -> None:
    ElementTree.fromstring(draw_svg([], {}, "nothing"))


def test_explaining_with_inputs_leaves_the_model_as_it_was() -> None:
    model = fxquant.prepare(Residual(), (IMAGE,))
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    forwards = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    reports = compile_reports()
    fxquant.explain(model, (IMAGE,))
    assert forwards == {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) or value.isnan().all() for name, value in before.items())
    assert compile_reports() == reports
    bound = bound_forward(model)
    assert bound is not None and bound.eager_runs == 0


ERRORS = {
    "no inputs": (
        lambda model, folder: fxquant.explain(model).draw(folder / "a.svg"),
        r"explain must be given example inputs to draw: got none\.",
    ),
    "another format": (
        lambda model, folder: fxquant.explain(model, (FLAT,)).draw(folder / "a.png"),
        r"path must end in \.svg: got '.*a\.png'\.",
    ),
    "no tuple": (
        lambda model, folder: fxquant.explain(model, FLAT),
        r"args must be a tuple of example inputs: got Tensor\. Write \(x,\) for a single input\.",
    ),
    "inputs that do not fit": (
        lambda model, folder: fxquant.explain(model, (IMAGE,)),
        r"args and kwargs must run through the model: got \w+Error: .* Give explain what",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, tmp_path: Path) -> None:
    call, message = ERRORS[case]
    model = fxquant.prepare(Forked(), (FLAT,))
    with pytest.raises(InvalidArgument, match=f"(?s){message}"):
        call(model, tmp_path)
