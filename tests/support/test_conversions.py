"""Conversions of loops with halves: the same bits, in vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import run_and_get_code

from fxquant.support.patches import CONVERSIONS

_NUMBERS = 67  # two of the widest vectors, and a rest of three


@pytest.fixture(autouse=True)
def converted() -> Iterator[None]:
    """Vectors on this CPU, in the default backend."""
    if not cpu_vec_isa.pick_vec_isa():
        pytest.skip("no vectors for this CPU in torch's headers")
    with CONVERSIONS.acting(), torch._inductor.config.patch(force_disable_caches=True):
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """A conversion between two types, of numbers that ``source`` holds, in a loop that reads bfloat16."""

    source: Tensor
    to: torch.dtype
    by_numbers: str  # torch's own expression of it

    @property
    def id(self) -> str:
        return f"{self.source.dtype} to {self.to}".replace("torch.", "")


def every(dtype: torch.dtype) -> Tensor:
    """The bytes of a type, the extremes of a wider one among numbers of all sizes."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(dtype)[-_NUMBERS:].repeat(4)
    limits = torch.iinfo(torch.int32)
    near = torch.tensor([limits.min, limits.max, 2**24 + 1, -(2**24) - 1, 127, 128, 255, 256, -128, -129, 0])
    some = torch.randint(limits.min, limits.max, (_NUMBERS - len(near),), generator=torch.Generator().manual_seed(0))
    return torch.cat([near, some]).to(torch.int32)


CASES = (
    Case(source=every(torch.int32), to=torch.float32, by_numbers="convert<float,2,int32_t,2>"),
    Case(source=torch.linspace(-300.9, 300.9, _NUMBERS), to=torch.int32, by_numbers="convert<int32_t,2,float,2>"),
    Case(source=every(torch.int32), to=torch.uint8, by_numbers="convert<uint8_t,1,int32_t,2>"),
    Case(source=every(torch.int32), to=torch.int8, by_numbers="convert<int8_t,1,int32_t,2>"),
    Case(source=every(torch.uint8), to=torch.int32, by_numbers="convert<int32_t,2,uint8_t,1>"),
    Case(source=every(torch.int8), to=torch.int32, by_numbers="convert<int32_t,2,int8_t,1>"),
)


def compiled(case: Case) -> tuple[Tensor, str]:
    """The converted numbers, as Inductor computes them in a loop that reads halves too; its code."""

    halves = torch.zeros(case.source.shape, dtype=torch.bfloat16)

    def converted(source: Tensor, halves: Tensor) -> Tensor:
        return source.to(case.to) + halves.to(case.to)

    torch._dynamo.reset()
    numbers, (code,) = run_and_get_code(torch.compile(converted), case.source, halves)
    return numbers, code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits_are_those_of_eager_and_no_number_is_converted_alone(case: Case) -> None:
    found, code = compiled(case)
    assert torch.equal(found, case.source.to(case.to))
    assert "VectorizedN<" in code and case.by_numbers not in code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch_itself_converts_one_by_one(case: Case) -> None:
    """What the patch is for: a torch that needs it no more is seen here."""

    def own(expression: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        return expression(*args, **kwargs)

    with CONVERSIONS.acting(own):
        assert case.by_numbers in compiled(case)[1]
