"""Every block of Python in docs/ runs, one after the other on a page.

docs/getting-started.md prints what it shows; numbers, which depend on the CPU's sums, are only held to their order.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed

from tests.house import notebook

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = {name: [textwrap.dedent(found[2]) for found in BLOCK.finditer(text)] for name, text in PAGES.items()}
GETTING_STARTED = "getting-started.md"
ELSEWHERE = {  # what else is asked of them is asked where they run
    GETTING_STARTED: "tests/test_pages.py",
    "cost.md": "tests/test_docs.py",
    "gpu.md": "tests/backend/inductor/test_gpu.py",
    "placement.md": "tests/test_docs.py",
    "ptq.md": "tests/ptq/test_methods.py",
    "schedules.md": "tests/training/test_guide.py",
    "tensorrt.md": "tests/test_docs.py",
}
NEEDS = {"formats.md": "tensorrt_rtx"}
MODEL = """
import torch, fxquant
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)
    def forward(self, x):
        return self.head(self.blocks(x))

model, x = Net(), torch.randn(4, 16)
"""
# What the reader has: a model, data, processes that were joined.
GIVEN = {
    "distributed.md": MODEL
    + """
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
""",
    "ranges.md": MODEL + "batches = [x]\n",
}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that a page's blocks are run in, which Dynamo can import; in an empty folder."""
    held = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, held.__name__, held)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield held
    torch._dynamo.reset()


@pytest.fixture
def joined() -> Iterator[None]:
    """This process as a group of one."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def run(page: ModuleType, block: str, name: str) -> None:
    """Without Inductor, which is not what a page is about."""
    block = block.replace('backend="fxquant"', 'backend="fxquant_eager"')
    exec(compile(block, name, "exec"), vars(page))


def test_every_page_with_a_block_is_run() -> None:
    with_blocks = {name for name, blocks in BLOCKS.items() if blocks}
    assert len(with_blocks) > 15 and with_blocks >= ELSEWHERE.keys() | GIVEN.keys() | NEEDS.keys()
    assert sum(map(len, BLOCKS.values())) == sum(text.count("```python") for text in PAGES.values())
    for name, test in ELSEWHERE.items():
        assert name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not run {name}"


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks and name not in ELSEWHERE])
def test_the_blocks_of_a_page_run(name: str, page: ModuleType, request: pytest.FixtureRequest) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    if name == "distributed.md":
        request.getfixturevalue("joined")
    for block in (GIVEN.get(name, ""), *BLOCKS[name]):
        run(page, block, name)
        if name == "distributed.md" and "step" in vars(page):
            vars(page)["step"](vars(page)["x"]).sum().backward()
            exec(GIVEN[name], vars(page))  # each block begins with a model


def words(printed: str) -> Counter[str]:
    """Without numbers, whose widths say where a table breaks its lines, and without the lines below headings."""
    plain = re.sub(r"-?\d+(\.\d+)?(e[+-]\d+)?", "#", printed)
    return Counter(word for word in plain.split() if "──" not in word)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_getting_started_prints_what_it_shows(page: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parts = notebook.BLOCK.findall(PAGES[GETTING_STARTED])
    assert [code for code, _ in parts] == BLOCKS[GETTING_STARTED]
    printed = []
    for code, shown in parts:
        run(page, code, "digits.py")
        printed.append(capsys.readouterr().out)
        assert words(printed[-1]) == words(shown)
    calibrated, trained = map(float, re.findall(r"w4a8, \w+: (\S+)", printed[-2]))
    assert trained > calibrated
    assert "3 of 3 conv/gemm/matmul nodes run on integers (100.0 %)" in printed[-3]
    (differing,) = re.findall(r"^(\d+) of 399360 codes differ", printed[-3], re.MULTILINE)
    assert int(differing) <= 4, "one of 100,000, where a CPU sums in another order"


def test_the_notebook_is_that_of_the_page() -> None:
    written = notebook.NOTEBOOK.read_text(encoding="utf-8")
    assert written == notebook.notebook(PAGES[GETTING_STARTED]), "run python -m tests.house.notebook"
