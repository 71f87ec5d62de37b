"""Conformance vectors: what the first seed, a Rust port of torch's kernels, asserts of its own fake-quantize.

One vector for each of its cases, and for the divergences from torch that its comments say it closed. Each runs
against our operators, with zero points of both integer types, and against torch wherever torch has the behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.ops.fake_quantize import (
    fake_quantize_differentiable,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
)
from tests.ops.oracle import assert_same_bits

NAN, INF = float("nan"), float("inf")
NUMBERS, TENSORS, CHANNELS = "numbers", "tensors", "channels"


@dataclass(frozen=True)
class Vector:
    """One call and what must come of it.

    Attributes:
        name: readable id.
        kind: parameters as numbers, as tensors of one element, or per channel.
        input: float32 values.
        scale: as the kind needs it; nested for a wrong shape.
        point: the same.
        codes: expected codes, from which the expected values follow.
        y: expected values, where they do not follow from codes.
        dx: expected gradient of the sum of the output.
        error: part of the expected message.
        scale_dtype: of scale tensors.
        torch: whether torch has this behaviour too.
    """

    name: str
    kind: str
    input: Any
    scale: Any = 1.0
    point: Any = 0
    low: int = -128
    high: int = 127
    axis: int = 0
    codes: Any = None
    y: Any = None
    dx: Any = None
    error: str | None = None
    scale_dtype: torch.dtype = torch.float32
    torch: bool = True

    def __str__(self) -> str:
        return self.name

    def arguments(self, point_dtype: torch.dtype) -> tuple[Any, ...]:
        """Everything after the input."""
        if self.kind == NUMBERS:
            return self.scale, self.point, self.low, self.high
        scale = torch.tensor(self.scale, dtype=self.scale_dtype)
        point = torch.tensor(self.point, dtype=point_dtype)
        return (scale, point, *((self.axis,) if self.kind == CHANNELS else ()), self.low, self.high)

    def expected(self) -> Tensor:
        """Values in float32, by numpy: (code − zero point) · scale."""
        if self.codes is None:
            return torch.tensor(self.y, dtype=torch.float32)
        codes = np.asarray(self.codes, dtype=np.float32)
        scale = torch.tensor(self.scale, dtype=self.scale_dtype).float().numpy()
        point = np.asarray(self.point, dtype=np.float32)
        if self.kind == CHANNELS:
            shape = [-1 if d == self.axis else 1 for d in range(codes.ndim)]
            scale, point = scale.reshape(shape), point.reshape(shape)
        return torch.from_numpy(np.asarray((codes - point) * scale, dtype=np.float32))


def numbers(name: str, input: Any, **rest: Any) -> Vector:
    return Vector(name, NUMBERS, input, **rest)


def tensors(name: str, input: Any, **rest: Any) -> Vector:
    return Vector(name, TENSORS, input, **{"scale": [1.0], "point": [0], **rest})


def channels(name: str, input: Any, **rest: Any) -> Vector:
    return Vector(name, CHANNELS, input, **rest)


WIDE = [-200.0, -100.0, 0.0, 100.0, 200.0]
THREE_ROWS = [[0.0, 0.1, 0.2, -0.1, -0.2], [0.0, 0.05, 0.1, -0.05, -0.1], [1.0, 2.0, -1.0, -2.0, 0.0]]
TWO_ROWS = [[-1.0, 0.0, 1.0, 2.0], [-1.0, 0.0, 1.0, 2.0]]
PAIR = [1.0, 2.0]

# One for each case of the seed's own tests, in their order; those about autograd's bookkeeping are functions below.
CASES = [
    numbers("multiples of the scale stay", [0.0, 0.1, 0.2, -0.1, -0.2], scale=0.1, codes=[0, 1, 2, -1, -2]),
    numbers("beyond the range is clamped", WIDE, y=[-128.0, -100.0, 0.0, 100.0, 127.0]),
    numbers("refuses an inverted range", [1.0], low=128, high=-128, error="`quant_min`"),
    numbers("refuses a zero point outside", [1.0], point=200, error="`zero_point`"),
    numbers("unsigned with zero point", [-128.0, 0.0, 127.0], point=128, low=0, high=255, y=[-128.0, 0.0, 127.0]),
    numbers("halves go to even", [0.5, 1.5, 2.5, 3.5, -0.5, -1.5], y=[0.0, 2.0, 2.0, 4.0, 0.0, -2.0]),
    numbers("NaN is the lowest code, without gradient", [NAN], y=[-128.0], dx=[0.0]),
    tensors("tensors as numbers", WIDE, y=[-128.0, -100.0, 0.0, 100.0, 127.0]),
    tensors("refuses two scales", [1.0], scale=[1.0, 2.0], error="scale must be a 1-element", torch=False),
    tensors("refuses two zero points", [1.0], point=[0, 1], error="zero_point must be a 1-element", torch=False),
    numbers("gradient passes inside", [-10.0, 0.0, 10.0, 50.0], dx=[1.0] * 4),
    numbers(
        "gradient stops outside", [-5.0, -1.0, 0.0, 1.0, 5.0, 100.0], scale=0.01, dx=[0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    ),
    numbers(
        "gradient follows the code before clamping",
        [-10.0, -6.0, -5.0, 0.0, 5.0, 5.85, 6.0, 10.0],
        scale=0.05,
        point=10,
        dx=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
    ),
    channels(
        "each channel with its scale",
        THREE_ROWS,
        scale=[0.1, 0.05, 1.0],
        point=[0, 0, 0],
        codes=[[0, 1, 2, -1, -2], [0, 1, 2, -1, -2], [1, 2, -1, -2, 0]],
    ),
    channels(
        "axis 0", [[*PAIR, 3.0], [4.0, 5.0, 6.0]], scale=[0.5, 1.0], point=[0, 0], y=[[*PAIR, 3.0], [4.0, 5.0, 6.0]]
    ),
    channels(
        "axis 1",
        [[*PAIR, 3.0], [4.0, 5.0, 6.0]],
        scale=[0.5, 1.0, 2.0],
        point=[0, 0, 0],
        axis=1,
        y=[[1.0, 2.0, 4.0], [4.0, 5.0, 6.0]],
    ),
    channels(
        "gradient stops per channel",
        TWO_ROWS,
        scale=[0.05, 0.005],
        point=[0, 0],
        dx=[[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]],
    ),
    channels("refuses a scale of two axes", PAIR, scale=[[1.0, 1.0]], point=[0, 0], error="scale should be a 1-D"),
    channels("refuses points of two axes", PAIR, scale=[1.0, 1.0], point=[[0, 0]], error="zero point should be a 1-D"),
    channels("refuses unequal lengths", PAIR, scale=[1.0, 1.0], point=[0, 0, 0], error="same dimensions"),
    channels(
        "refuses a length unlike the axis",
        [PAIR, PAIR],
        scale=[1.0] * 3,
        point=[0] * 3,
        error="not consistent with input",
    ),
    channels("refuses an axis beyond the last", PAIR, scale=[1.0], point=[0], axis=5, error="`axis`", torch=False),
    channels("refuses one zero point outside", PAIR, scale=[1.0, 1.0], point=[0, 500], error="`zero_point`"),
    channels(
        "refuses an inverted range per channel",
        PAIR,
        scale=[1.0, 1.0],
        point=[0, 0],
        low=128,
        high=-128,
        error="`quant_min`",
    ),
]

# Where the seed once differed from torch, and says so.
DIVERGENCES = [
    numbers("scale 0", [1.0, -1.0, 0.0], scale=0.0, y=[0.0, -0.0, -0.0], dx=[0.0] * 3),
    numbers("scale 0 with zero point", [1.0, -1.0], scale=0.0, point=127, y=[0.0, -0.0], dx=[0.0] * 2),
    numbers("negative scale", [0.3, -0.3, 20.0], scale=-0.1, y=[0.3, -0.3, 12.8], dx=[1.0, 1.0, 0.0]),
    numbers("scale NaN", [1.0, 0.0], scale=NAN, y=[NAN, NAN], dx=[0.0, 0.0]),
    tensors("scale 0, tensor", [1.0, -1.0, 0.0], scale=[0.0], y=[0.0, -0.0, -0.0], dx=[0.0] * 3),
    tensors("zero point outside, tensor", [1.0, -1.0], point=[500], y=[-373.0, -373.0], dx=[0.0, 0.0]),
    channels("scale 0 per channel", [[1.0, -1.0, 0.0]], scale=[0.0], point=[0], y=[[-0.0] * 3], dx=[[0.0] * 3]),
    channels("negative scale per channel", [[0.3, -0.3]], scale=[-0.1], point=[0], y=[[0.3, -0.3]], dx=[[1.0, 1.0]]),
    channels("scale NaN per channel", [[1.0]], scale=[NAN], point=[0], y=[[NAN]], dx=[[0.0]]),
    channels("inf and 1e30 per channel", [[INF, 1e30, -INF]], scale=[1.0], point=[0], y=[[-128.0] * 3], dx=[[0.0] * 3]),
    numbers("+inf and 1e30 per tensor", [INF, 1e30, -INF], y=[127.0, 127.0, -128.0], dx=[0.0] * 3),
    # 12.75 · (1 / 0.1): a tie in float32, which goes to 128; 127.499998 in double, which would pass.
    numbers("gradient at a tie of float32", [12.75, 12.7], scale=0.1, codes=[127, 127], dx=[0.0, 1.0]),
    channels("gradient at a tie, per channel", [[12.75]], scale=[0.1], point=[0], codes=[[127]], dx=[[0.0]]),
    channels("bfloat16 scale", [[0.35]], scale=[0.1], point=[0], codes=[[3]], scale_dtype=torch.bfloat16, torch=False),
    tensors("bfloat16 scale, tensor", [0.35], scale=[0.1], codes=[3], scale_dtype=torch.bfloat16),
    channels(
        "refuses a double scale", [[1.0]], scale=[1.0], point=[0], scale_dtype=torch.float64,
        error="Scale must be Float or BFloat16, found Double",
    ),
    channels(
        "refuses a half scale", [[1.0]], scale=[1.0], point=[0], scale_dtype=torch.float16,
        error="Scale must be Float or BFloat16, found Half",
    ),
    channels("refuses axis = number of dimensions", [1.0], scale=[1.0], point=[0], axis=1, error="`axis`", torch=False),
]  # fmt: skip
VECTORS = CASES + DIVERGENCES


def outcome(
    vector: Vector, per_tensor: Callable[..., Tensor], per_channel: Callable[..., Tensor], point: torch.dtype
) -> None:
    x = torch.tensor(vector.input, dtype=torch.float32).requires_grad_()
    function = per_channel if vector.kind == CHANNELS else per_tensor
    if vector.error is not None:
        with pytest.raises((RuntimeError, IndexError)) as caught:
            function(x, *vector.arguments(point))
        assert vector.error in str(caught.value)
        return
    y = function(x, *vector.arguments(point))
    if vector.codes is not None or vector.y is not None:
        assert_same_bits(y.detach(), vector.expected())
    if vector.dx is not None:
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert_same_bits(dx, torch.tensor(vector.dx))


@pytest.mark.parametrize("point", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_ours(vector: Vector, point: torch.dtype) -> None:
    outcome(vector, fake_quantize_per_tensor_affine, fake_quantize_per_channel_affine, point)


@pytest.mark.parametrize("vector", [vector for vector in VECTORS if vector.torch], ids=str)
def test_torchs(vector: Vector) -> None:
    outcome(vector, torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine, torch.int32)


@pytest.mark.parametrize("vector", [vector for vector in VECTORS if vector.kind == NUMBERS], ids=str)
def test_the_older_name(vector: Vector) -> None:
    outcome(vector, fake_quantize_differentiable, fake_quantize_differentiable, torch.int32)


def test_the_seeds_cases_are_all_here() -> None:
    """29 cases stand in its test module: 24 vectors above (one case is two), and the six functions below."""
    assert len(CASES) == 24 and len({vector.name for vector in VECTORS}) == len(VECTORS)
    assert all(v.error or v.dx or v.y or v.codes for v in VECTORS)


# Cases about what autograd records.


def test_nothing_recorded_for_a_plain_input() -> None:
    y = fake_quantize_per_tensor_affine(torch.tensor([1.0, 2.0]), 1.0, 0, -128, 127)
    assert not y.requires_grad and y.grad_fn is None


def test_recorded_for_an_input_that_requires_it() -> None:
    y = fake_quantize_per_tensor_affine(torch.tensor([1.0, 2.0], requires_grad=True), 1.0, 0, -128, 127)
    assert y.requires_grad and y.grad_fn is not None


def test_recorded_per_channel_too() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = fake_quantize_per_channel_affine(x, torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, -128, 127)
    assert y.requires_grad and y.grad_fn is not None


def test_nothing_recorded_under_no_grad() -> None:
    with torch.no_grad():
        y = fake_quantize_per_tensor_affine(torch.tensor([1.0], requires_grad=True), 1.0, 0, -128, 127)
    assert y.grad_fn is None


def test_the_gradient_goes_on_through_relu() -> None:
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    torch.relu(fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_no_channels_give_an_empty_output() -> None:
    """torch has no minimum of no zero points to check."""
    x, scale, point = torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int32)
    assert fake_quantize_per_channel_affine(x, scale, point, 0, -128, 127).shape == (0, 4)
    with pytest.raises(RuntimeError, match=r"min\(\)"):
        torch.fake_quantize_per_channel_affine(x, scale, point, 0, -128, 127)
