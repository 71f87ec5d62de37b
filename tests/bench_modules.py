"""Scripts of bench/ as modules, for one test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def bench_module(monkeypatch: pytest.MonkeyPatch, name: str, *others: str) -> Iterator[ModuleType]:
    """A script, imported as it imports its neighbours, of which ``others`` are named; all are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    for each in (name, *others):
        monkeypatch.delitem(sys.modules, each, raising=False)
    yield importlib.import_module(name)
    for each in (name, *others):
        sys.modules.pop(each, None)
