"""The README: its example prints what is shown, its tables are those of the results, its links lead on."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fxquant.targets.cpu import integer_dot_support

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def lines_of(printed: str) -> list[str]:
    """Lines without their numbers, and without the table of sites whose codes moved, which chance fills."""
    sites = re.compile(r"(site|────+)  +(differ|─)|[\w.]+  +\d+  +\d+")
    kept = [line for line in printed.splitlines() if not sites.match(line)]
    return [re.sub(r"\d[\d.e+-]*", "#", line) for line in kept]


def test_the_example_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (shown,) = re.findall(r"```\n(model\.onnx .*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    kernels = shown.splitlines().index("4 of 4 conv/gemm/matmul nodes run on integers (100.0 %)") + 1
    # A CPU without dot products of bytes is named, and what it makes of the sums.
    said = None if integer_dot_support() is None else kernels
    assert lines_of(printed)[:said] == lines_of(shown)[:said]
    assert "4 of 4 conv/gemm/matmul nodes run on integers (100.0 %)" in printed and "(0 at inputs, " in printed


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/readme.py."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("readme")
    sys.modules.pop("readme", None)


def test_its_tables_are_those_of_the_results(readme: ModuleType) -> None:
    assert readme.page(TEXT) == TEXT, "run python bench/readme.py"
    with pytest.raises(ValueError, match=r"README\.md must hold '<!-- written by"):
        readme.page("# fxquant")


def test_the_newest_row_counts_and_the_later_of_a_day(readme: ModuleType) -> None:
    rows = [
        {"net": "a", "date": "2026-02-01", "value": 1},
        {"net": "a", "date": "2026-03-01", "value": 2},
        {"net": "a", "date": "2026-03-01", "value": 3},
        {"net": "a", "date": "2026-01-01", "value": 4},
        {"net": "b", "date": "2026-04-01", "value": 5},
    ]
    assert readme.newest(rows, net="a")["value"] == 3
    assert readme.newest(rows, net="c") is None


def test_its_picture_is_what_explain_draws(readme: ModuleType, tmp_path: Path) -> None:
    readme.draw(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text() == (ROOT / "docs" / "images" / "plan.svg").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in filter(None, (a or b for a, b in links)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_it_mentions_exists(page: Path) -> None:
    import fxquant
    import fxquant.report

    for name in set(re.findall(r"\bfxquant\.([a-zA-Z_]+(?:\.[a-z_]+)?)\(", page.read_text(encoding="utf-8"))):
        target = fxquant
        for part in name.split("."):
            target = getattr(target, part)
        assert callable(target), name
