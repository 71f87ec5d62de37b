"""Fixtures of the model tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from fxquant.errors import NotQuantizedWarning


@pytest.fixture
def cold() -> Iterator[None]:
    """No compiled graph from before, and a part that silently stays float is an error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        yield
    torch._dynamo.reset()
