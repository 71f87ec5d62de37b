"""Fixtures of all tests."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch

from fxquant.backend import reports
from fxquant.backend.reuse import stores
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


@pytest.fixture
def none_kept(cold: None) -> Iterator[None]:
    """No quantized weight is kept from before, and none stays behind the graphs that keep it."""
    gc.collect()
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not stores()


@pytest.fixture
def no_earlier_compiles() -> Iterator[None]:
    """Reports of other tests' compiles are put aside: models with equal site lists share them."""
    with reports.unreported():
        reports.LOGS.clear()
        yield
