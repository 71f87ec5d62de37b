"""What the tests of reports share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxquant.backend import reports


@pytest.fixture(autouse=True)
def no_earlier_compiles() -> Iterator[None]:
    """Reports of other tests' compiles are put aside: models with equal site lists share them."""
    with reports.unreported():
        reports.LOGS.clear()
        yield
