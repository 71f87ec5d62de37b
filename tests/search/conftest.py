"""What these tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(no_earlier_compiles: None) -> None:
    """No test sees the reports of another's compiles."""
