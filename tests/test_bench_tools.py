"""The bench of the tools' own time: a row has every step, and memory is that of one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.bench_modules import bench_module


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from bench_module(monkeypatch, "bench_tools", "bench_latency", "latency_nets", "machine", "nets")


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
