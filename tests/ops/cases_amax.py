"""Cases of the amax family: integers, min/max pairs and small floats, trained amax and pass-through."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.ops.amax import (
    FAKE_AFFINE_TENSOR_QUANT,
    FAKE_TENSOR_QUANT,
    FAKE_TENSOR_QUANT_LEARNABLE,
    FAKE_TENSOR_QUANT_PASS_THROUGH,
    LEGACY_FAKE_TENSOR_QUANT,
    SCALED_FLOAT,
    SCALED_FLOAT_LEARNABLE,
    SCALED_FLOAT_PASS_THROUGH,
    TENSOR_QUANT,
)
from tests.ops.cases import Case


def one(x: Tensor, value: float = 1.5) -> Tensor:
    return torch.tensor(value, device=x.device)


def rows(x: Tensor) -> Tensor:
    """One amax per slice of the last dimension but one, the first of them 0."""
    return (torch.arange(x.shape[-2], device=x.device) * 0.4).reshape(-1, 1)


def several(x: Tensor) -> Tensor:
    """An amax per row and column of the last two dimensions."""
    count = x.shape[-2] * x.shape[-1]
    return torch.logspace(-2, 1, count, device=x.device).reshape(x.shape[-2:])


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor(-0.7, device=x.device), torch.tensor([1.9], device=x.device)


LEARNED = ("input", "amax")

CASES = [
    Case("tensor quant", TENSOR_QUANT, lambda x: (x, one(x))),
    Case("tensor quant, rows, wide", TENSOR_QUANT, lambda x: (x, rows(x), 4, False, False), elementwise=False),
    Case("fake tensor quant", FAKE_TENSOR_QUANT, lambda x: (x, one(x))),
    Case("fake tensor quant, rows", FAKE_TENSOR_QUANT, lambda x: (x, rows(x), 8, False, False), elementwise=False),
    Case("fake tensor quant, several", FAKE_TENSOR_QUANT, lambda x: (x, several(x), 4), elementwise=False),
    Case("fake tensor quant, 16 bits", FAKE_TENSOR_QUANT, lambda x: (x, one(x), 16)),
    Case("fake tensor quant, zero", FAKE_TENSOR_QUANT, lambda x: (x, one(x, 2.0**-24))),
    Case("fake tensor quant, straight through", FAKE_TENSOR_QUANT_PASS_THROUGH, lambda x: (x, one(x))),
    Case("fake tensor quant, learned", FAKE_TENSOR_QUANT_LEARNABLE, lambda x: (x, one(x), 4), grads=LEARNED),
    Case(
        "fake tensor quant, learned rows",
        FAKE_TENSOR_QUANT_LEARNABLE,
        lambda x: (x, rows(x), 4),
        elementwise=False,
        grads=LEARNED,
    ),
    Case("legacy fake tensor quant", LEGACY_FAKE_TENSOR_QUANT, lambda x: (x, one(x))),
    Case("legacy fake tensor quant, rows", LEGACY_FAKE_TENSOR_QUANT, lambda x: (x, rows(x), 8), elementwise=False),
    Case("fake affine tensor quant", FAKE_AFFINE_TENSOR_QUANT, lambda x: (x, *pair(x))),
    Case("fake affine tensor quant, 4 bits", FAKE_AFFINE_TENSOR_QUANT, lambda x: (x, *pair(x), 4)),
    Case("scaled float, bare", SCALED_FLOAT, lambda x: (x, None)),
    Case("scaled float", SCALED_FLOAT, lambda x: (x, one(x))),
    Case("scaled float, rows, e5m2", SCALED_FLOAT, lambda x: (x, rows(x), 5, 2), elementwise=False),
    Case("scaled float, e2m1", SCALED_FLOAT, lambda x: (x, one(x), 2, 1)),
    Case("scaled float, straight through", SCALED_FLOAT_PASS_THROUGH, lambda x: (x, one(x))),
    Case("scaled float, learned", SCALED_FLOAT_LEARNABLE, lambda x: (x, one(x), 3, 2), grads=LEARNED),
    Case(
        "scaled float, learned rows", SCALED_FLOAT_LEARNABLE, lambda x: (x, rows(x)), elementwise=False, grads=LEARNED
    ),
]
