"""The page about a model: what it says, that it stands alone, and that names cannot break it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
import fxquant.report
from fxquant.errors import InvalidArgument
from tests.report.nets import IMAGE, Residual

VOID = {"meta", "br", "rect", "line", "circle", "path"}


class Read(HTMLParser):
    """Rows of the tables by heading, texts of the cards; every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: dict[str, list[list[str]]] = {}
        self.heading, self.cards = "", [""]
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.words[self.heading].append([])
        if tag in ("td", "th"):
            self.words[self.heading][-1].append("")
        if dict(attrs).get("class") == "card":
            self.cards.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag == "h2":
            self.words[self.heading] = []

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self.heading += data
        elif "td" in self.open or "th" in self.open:
            self.words[self.heading][-1][-1] += data
        elif "div" in self.open and not self.heading:
            self.cards[-1] += f"{data} "


@pytest.fixture(scope="module")
def ready() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield fxquant.calibrate(fxquant.prepare(Residual(), (IMAGE,)), [IMAGE], progress=False).eval()


def test_it_says_what_explain_sqnr_and_verify_say(ready: nn.Module, tmp_path: Path) -> None:
    fxquant.export_onnx(ready, (IMAGE,), tmp_path / "m.onnx")
    verified = fxquant.verify_onnx(ready, (IMAGE,), tmp_path / "m.onnx", rounds=0)
    fxquant.report.html(ready, (IMAGE,), tmp_path / "page.html", verified=verified)
    page = Read((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert list(page.words) == ["Graph", "Sites", f"Products in {verified.runtime}"]
    header, *rows = page.words["Sites"]
    explained, noise = fxquant.explain(ready, (IMAGE,)), fxquant.report.sqnr(ready, (IMAGE,))
    assert header == ["site", "format", "range", "SQNR", "expected kernel", "why", "source"]
    assert [row[:4] for row in rows] == [[r.key, r.spec, r.range, f"{noise[r.key]:.1f} dB"] for r in explained.rows]
    products = page.words[f"Products in {verified.runtime}"][1:]
    assert [row[:4] for row in products] == [[r.name, r.op_type, r.kernel, "yes"] for r in verified.rows]
    cards = " ".join(page.cards)
    assert f"{len(rows)} sites" in cards and "100 % of the compute" in cards and "4 of 4 products" in cards
    assert f"0 of {verified.compared_codes:,} codes differ" in cards and "float file's time" not in cards


def test_it_stands_alone(ready: nn.Module, tmp_path: Path) -> None:
    fxquant.report.html(ready, (IMAGE,), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not Read(text).sources and "<script" not in text
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text and "verif" not in text.lower()


def test_what_stays_float_is_told_with_the_reason(tmp_path: Path) -> None:
    model = fxquant.prepare(Residual(), (IMAGE,), rules=[fxquant.skip("head"), fxquant.skip(kind="add")])
    fxquant.calibrate(model, [IMAGE], progress=False)
    fxquant.report.html(model, (IMAGE,), tmp_path / "page.html")
    page = Read((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [row[1] for row in page.words["Most work in float"][1:]] == ["head"]
    assert "Rule(kind='add', spec=None)" in [row[1] for row in page.words["Left in float"]]


def test_names_are_text(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("<b>&amp;", nn.Linear(4, 4))
    x = torch.randn(2, 4)
    fxquant.calibrate(fxquant.prepare(model, (x,)), [x], progress=False)
    fxquant.report.html(model, (x,), tmp_path / "page.htm")
    page = Read((tmp_path / "page.htm").read_text(encoding="utf-8"))
    assert [row[0] for row in page.words["Sites"][1:]] == ["<b>&amp;.input", "<b>&amp;.weight"]


def test_bad_input_writes_nothing(ready: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"path must end in \.html: got '.*page\.pdf'"):
        fxquant.report.html(ready, (IMAGE,), tmp_path / "page.pdf")
    with pytest.raises(InvalidArgument, match="path must be in a folder that is there: got "):
        fxquant.report.html(ready, (IMAGE,), tmp_path / "none" / "page.html")
    with pytest.raises(InvalidArgument, match="prepare"):
        fxquant.report.html(Residual(), (IMAGE,), tmp_path / "page.html")
    with pytest.raises(InvalidArgument, match="must run through the model"):
        fxquant.report.html(ready, (IMAGE[0, 0],), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
