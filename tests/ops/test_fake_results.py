"""Metadata of an operator's results is computed once for operands of one form."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant import ops

SCALE, POINT = torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32)


class Counted(FakeTensorMode):
    """A fake mode that counts what it is asked for: `fake_quantize` is one negation to it, or else its arithmetic."""

    calls = 0
    arithmetic = 0

    def dispatch(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func is torch.ops.aten.neg.default
        self.arithmetic += func is torch.ops.aten.round.default
        return super().dispatch(func, types, args, kwargs)


def asked(mode: Counted, x: FakeTensor, quant_max: int) -> FakeTensor:
    with mode:
        return ops.fake_quantize_per_tensor_affine(x, *map(mode.from_tensor, (SCALE, POINT)), 0, quant_max)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(13, 7),
        torch.randn(13, 7, dtype=torch.bfloat16),
        torch.randn(2, 13, 5, 3).to(memory_format=torch.channels_last),
        torch.randn(7, 13).t(),
        torch.randn(13, 7)[:, ::2],
        torch.randn(13, 1).expand(13, 7),
        torch.randn(()),
        torch.empty(0, 13),
    ],
    ids=["dense", "bfloat16", "channels_last", "transposed", "strided", "expanded", "scalar", "empty"],
)
def test_a_second_call_does_no_arithmetic_and_says_the_same(x: torch.Tensor) -> None:
    real = ops.fake_quantize_per_tensor_affine(x, SCALE, POINT, 0, 131)
    for _ in range(2):  # the first may be one of another test's forms
        mode = Counted()
        found = asked(mode, mode.from_tensor(x), 131)
    assert mode.calls == 0
    assert isinstance(found, FakeTensor) and found.fake_mode is mode
    assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


def test_other_numbers_are_another_form() -> None:
    mode = Counted()
    x = mode.from_tensor(torch.randn(13, 11))
    for quant_max in (101, 102, 101):
        asked(mode, x, quant_max)
    assert mode.calls == 2


def test_symbolic_sizes_are_asked_for_each_time_without_the_arithmetic() -> None:
    mode = Counted(shape_env=ShapeEnv(), static_shapes=False)
    x = mode.from_tensor(torch.randn(13, 17))
    assert not all(type(size) is int for size in x.shape)
    for _ in range(2):
        found = asked(mode, x, 133)
        assert found.shape == x.shape
        assert found.stride() == x.stride()
    assert (mode.calls, mode.arithmetic) == (2, 0)


def test_an_error_is_none_to_remember() -> None:
    mode = Counted()
    x = mode.from_tensor(torch.zeros(13, 19, dtype=torch.int32))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must be"):
            asked(mode, x, 134)


def test_meta_tensors_stay_plain() -> None:
    for _ in range(2):
        x, scale, point = torch.empty(13, 23, device="meta"), SCALE.to("meta"), POINT.to("meta")
        found = ops.fake_quantize_per_tensor_affine(x, scale, point, 0, 135)
        assert type(found) is torch.Tensor and found.device.type == "meta" and found.shape == x.shape
