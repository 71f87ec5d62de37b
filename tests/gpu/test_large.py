"""Tensors of more than 2³¹ elements: every place of them is reached, and by the right index. On CPU, small ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant import ops
from fxquant.ops.fake_quantize import PER_CHANNEL_BACKWARD, PER_TENSOR_BACKWARD
from fxquant.ops.saved import CLIP_MASK
from tests.gpu.harness import kernels, needs_bytes

COLUMNS = 1 << 11
QPARAMS = (-128, 127)
# Whether a path makes copies in float32 on its way: bytes an element beyond what goes in and comes out.
TEMPORARY = {"cuda": 0, "aten": 20, "compiled": 0}

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
PER_TENSOR: dict[str, Op] = {
    "fake quantize": lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, s, z, *QPARAMS, rounding="divide"),
    "codes": lambda x, s, z: ops.quantize_per_tensor(x, s, z, *QPARAMS),
    "mask": lambda x, s, z: CLIP_MASK(x, s, z, *QPARAMS, rounding="divide"),
    "gradient": lambda x, s, z: PER_TENSOR_BACKWARD(x, x, s, z, *QPARAMS, rounding="divide"),
}
PER_CHANNEL: dict[str, Op] = {
    "fake quantize": lambda x, s, z: ops.fake_quantize_per_channel_affine(x, s, z, 1, *QPARAMS, rounding="divide"),
    "gradient": lambda x, s, z: PER_CHANNEL_BACKWARD(x, x, s, z, 1, *QPARAMS, rounding="divide"),
}


def elements(device: str) -> int:
    """A little more than 2³¹, not a multiple of 16, in whole rows."""
    return (2**31 // COLUMNS + 3 if device == "cuda" else 37) * COLUMNS


def places(count: int) -> list[slice]:
    """Both ends, around each power of two from 2²⁹ on, and some in between."""
    middle = [2**29, 2**30, 2**31 - 1, 2**31] + [count * k // 7 for k in range(1, 7)]
    starts = [0, count - COLUMNS, *(max(at - COLUMNS // 2, 0) for at in middle if at < count)]
    return [slice(at // COLUMNS * COLUMNS, min(at // COLUMNS * COLUMNS + 2 * COLUMNS, count)) for at in starts]


def large(device: str, path: str) -> Tensor:
    count = elements(device)
    needs_bytes(int(count * (6 + TEMPORARY[path]) * 1.15), device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(count, dtype=torch.float16, device=device)
    for part in x.split(2**28):  # of so many at a time every generator is sure
        part.normal_(generator=generator)
    return x


def check(x: Tensor, y: Tensor, op: Op, qparams: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> None:
    """Rows of the result here and there are the CPU's of the same rows."""
    assert y.shape == x.shape
    for at in places(x.numel()):
        rows = x.view(-1)[at].cpu().view(shape)
        expected = op(rows, *(t.cpu() for t in qparams)).view(-1)
        got = y.view(-1)[at].cpu()
        differing = int((got != expected).sum())
        assert differing == 0, f"{differing} of {got.numel()} from {at.start} differ"


def run(op: Op, x: Tensor, qparams: tuple[Tensor, Tensor], path: str) -> Tensor:
    with torch.no_grad():
        if path == "compiled":
            return torch.compile(op, fullgraph=True, dynamic=False)(x, *qparams)
        with kernels(path):
            return op(x, *qparams)


@pytest.mark.parametrize("name", PER_TENSOR)
def test_per_tensor(name: str, path: str, device: str) -> None:
    assert_per_tensor(name, path, device)


@pytest.mark.parametrize("name", PER_TENSOR)
def test_per_tensor_compiled(name: str, device: str) -> None:
    assert_per_tensor(name, "compiled", device)


def assert_per_tensor(name: str, path: str, device: str) -> None:
    x = large(device, path)
    qparams = torch.tensor([0.02]).to(device), torch.tensor([3], dtype=torch.int32).to(device)
    check(x, run(PER_TENSOR[name], x, qparams, path), PER_TENSOR[name], qparams, (-1,))


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel(name: str, path: str, device: str) -> None:
    assert_per_channel(name, path, device)


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel_compiled(name: str, device: str) -> None:
    assert_per_channel(name, "compiled", device)


def assert_per_channel(name: str, path: str, device: str) -> None:
    """A scale for each column: an index that wrapped would take another's."""
    x = large(device, path).view(-1, COLUMNS)
    scale = torch.logspace(-3, 0, COLUMNS).to(device)
    qparams = scale, torch.zeros(COLUMNS, dtype=torch.int32, device=device)
    check(x, run(PER_CHANNEL[name], x, qparams, path), PER_CHANNEL[name], qparams, (-1, COLUMNS))


def test_places_reach_both_ends_and_around_the_border() -> None:
    count = (2**31 // COLUMNS + 3) * COLUMNS
    found = places(count)
    assert found[0].start == 0 and found[1].stop == count
    assert any(at.start < 2**31 <= at.stop for at in found)
    assert all(at.start % COLUMNS == 0 and at.stop - at.start in (COLUMNS, 2 * COLUMNS) for at in found)
