from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fxquant.ops import affine_qparams, update_min_max
from tests.ops.oracle import assert_same_bits


@dataclass(frozen=True)
class Batch:
    name: str
    values: tuple[float, ...]
    low: float
    high: float

    def __str__(self) -> str:
        return self.name


BATCHES = (
    Batch("ordinary", (-1.0, 0.3, 2.7), -0.5, 1.5),
    Batch("first", (-1.0, 0.3, 2.7), math.nan, math.nan),
    Batch("positive", (0.1, 0.3), 0.2, 0.4),
    Batch("zeros", (0.0, -0.0), 0.0, 0.0),
    Batch("nan", (math.nan, 1.0), -1.0, 1.0),
    Batch("infinite", (math.inf, 1.0), -1.0, 1.0),
    Batch("huge", (-3.4e38, 3.4e38), -3.4e38, 3.4e38),
    Batch("subnormal", (-1e-40, 1e-45), -1e-40, 1e-45),
)


def observe(x: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """One step of a site: the range is updated, in place too, and gives scale and zero point."""
    new_low, new_high = update_min_max(x, low, high, 0.01)
    low.copy_(new_low)
    high.copy_(new_high)
    return affine_qparams(new_low, new_high, 0, 255, symmetric)


@pytest.fixture(scope="module")
def compiled() -> object:
    return torch.compile(observe, backend="fxquant", options={"recipe": None}, dynamic=False)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_a_site_has_the_bits_of_eager(compiled: object, batch: Batch, symmetric: bool) -> None:
    x = torch.tensor(batch.values).repeat(12)[:24]
    found = []
    for run in (observe, compiled):
        state = torch.tensor([batch.low]), torch.tensor([batch.high])
        found.append((*run(x, *state, symmetric), *state))  # type: ignore[operator]
    for ours, eager in zip(*found, strict=True):
        assert_same_bits(ours, eager)


def test_nothing_but_results_is_stored() -> None:
    """Two extremes, the new range, scale and zero point; as one node for each operation it was 26 buffers."""
    torch._dynamo.reset()
    run = torch.compile(observe, backend="fxquant", options={"recipe": None})
    state = torch.tensor([-1.0]), torch.tensor([1.0])
    _, (code,) = run_and_get_code(lambda: run(torch.randn(64), *state, False))
    assert 0 < code.count("= empty_strided_cpu(") <= 6
