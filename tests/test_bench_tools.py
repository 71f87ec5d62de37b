"""The bench of the tools' own time: a row has every step, and memory is that of one step."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("bench_tools", "latency_nets", "machine", "nets")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, imported as it imports its neighbours, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("bench_tools")
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_row_has_every_step(tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    monkeypatch.setattr(tools, "build", lambda name: (tiny, torch.randn(1, 8)))
    monkeypatch.setattr(tools, "memory", lambda name: {key: 2**20 * (2 + i) for i, key in enumerate(tools.STEPS)})
    row = tools.measure("tiny", 1)
    assert all(row[f"{step}_s"] >= 0 for step in tools.STEPS) and row["export_ratio"] > 0
    assert [row[f"{step}_mib"] for step in tools.STEPS] == [2, 3, 4, 5, 6]


def test_memory_is_what_the_step_had_at_most(tools: ModuleType) -> None:
    kept = torch.ones(2**22)  # 16 MiB, not the step's
    with tools.Peak() as peak:
        given = torch.ones(2**24)  # 64 MiB, gone at its end
        time.sleep(0.1)
        del given
    assert 60 <= (peak.highest - peak.before) / 2**20 < 80
    assert kept[0] == 1
