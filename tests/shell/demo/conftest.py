"""Fixtures of the demo's tests."""

from __future__ import annotations

import pytest

from fxquant.shell.demo.data import Digits


@pytest.fixture(scope="session")
def digits() -> Digits:
    pytest.importorskip("sklearn")
    from fxquant.shell.demo import data

    return data.load(0)
