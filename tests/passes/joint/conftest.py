"""Fixtures of the joint passes' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.passes.joint import use_integer_backward, use_integer_matmul


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times that a test measures, or makes up, are not those of later ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which it takes a measurement to know whether integers are faster."""
    for module in (use_integer_matmul, use_integer_backward):
        monkeypatch.setattr(module, "never_faster", lambda device: "")
