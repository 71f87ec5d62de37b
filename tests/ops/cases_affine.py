"""Cases of the fake-quantize family, its ranges and its export forms."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.ops.fake_quantize import (
    PER_CHANNEL,
    PER_CHANNEL_BACKWARD,
    PER_TENSOR,
    PER_TENSOR_BACKWARD,
    PER_TENSOR_SCALAR,
)
from fxquant.ops.marks import BIND
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE
from fxquant.ops.qparams import (
    AFFINE_QPARAMS,
    AVERAGE_MIN_MAX,
    BATCH_MIN_MAX,
    CHANNEL_MIN_MAX,
    EXTEND_MIN_MAX,
    RESOLVE_MIN_MAX,
    SYMMETRIC_QPARAMS,
    UPDATE_MIN_MAX,
)
from tests.ops.cases import Case

DIVIDE = {"rounding": "divide"}


def one(x: Tensor, scale: float = 0.1, point: int = 3) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor."""
    return torch.tensor([scale], device=x.device), torch.tensor([point], dtype=torch.int32, device=x.device)


def many(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Scales from 1e-3 to 10 and zero points 0, 1, 2, … along an axis."""
    count = x.shape[axis]
    scales = torch.logspace(-3, 1, count, device=x.device)
    return scales, (torch.arange(count, device=x.device) % 7).to(torch.int32)


def floating(qparams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return qparams[0], qparams[1] + 0.375


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([-1.0], device=x.device), torch.tensor([2.0], device=x.device)


CASES = [
    Case("per tensor, numbers", PER_TENSOR_SCALAR, lambda x: (x, 0.1, 3, 0, 15)),
    Case("per tensor, numbers, divide", PER_TENSOR_SCALAR, lambda x: (x, 0.1, 0, -8, 7), DIVIDE),
    Case("per tensor", PER_TENSOR, lambda x: (x, *one(x), 0, 15)),
    Case("per tensor, divide", PER_TENSOR, lambda x: (x, *one(x), -128, 127), DIVIDE),
    Case("per channel", PER_CHANNEL, lambda x: (x, *many(x, 1), 1, 0, 15), elementwise=False),
    Case("per channel, divide", PER_CHANNEL, lambda x: (x, *many(x, 1), 1, -8, 7), DIVIDE, elementwise=False),
    Case("per channel, last axis", PER_CHANNEL, lambda x: (x, *many(x, 2), 2, -8, 7), elementwise=False),
    Case("per channel, float points", PER_CHANNEL, lambda x: (x, *floating(many(x, 1)), 1, 0, 15), elementwise=False),
    Case("per tensor backward", PER_TENSOR_BACKWARD, lambda x: (x, x.detach() * 2, *one(x), 0, 15), grads=("grad",)),
    Case(
        "per channel backward",
        PER_CHANNEL_BACKWARD,
        lambda x: (x, x.detach() * 2, *many(x, 1), 1, 0, 15),
        grads=("grad",),
        elementwise=False,
    ),
    Case("batch min max", BATCH_MIN_MAX, lambda x: (x,), grads=()),
    Case("channel min max", CHANNEL_MIN_MAX, lambda x: (x, 1), grads=(), elementwise=False),
    Case("average min max", AVERAGE_MIN_MAX, lambda x: (*ranges(x), *ranges(x)[::-1], 0.1), grads=(), takes_x=False),
    Case("update min max", UPDATE_MIN_MAX, lambda x: (x, *ranges(x), 0.1), grads=()),
    Case("extend min max", EXTEND_MIN_MAX, lambda x: (x, *ranges(x)), grads=()),
    Case("resolve min max", RESOLVE_MIN_MAX, lambda x: (x, *ranges(x)), grads=()),
    Case("affine qparams", AFFINE_QPARAMS, lambda x: (*ranges(x), 0, 255, False), grads=(), takes_x=False),
    Case("bias", FAKE_QUANTIZE_BIAS, lambda x: (x, one(x)[0], one(x, 0.02)[0]), grads=("bias",)),
    Case("symmetric qparams", SYMMETRIC_QPARAMS, lambda x: (x, None, 127), grads=()),
    Case("symmetric qparams, axis", SYMMETRIC_QPARAMS, lambda x: (x, 1, 127), grads=(), elementwise=False),
    Case(
        "dequantize, export",
        DEQUANTIZE,
        lambda x: (torch.nan_to_num(x.float()).clamp(-9, 9).to(torch.int8), *many(x, 1), 1),
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "dequantize in blocks, export",
        DEQUANTIZE,
        lambda x: (
            torch.nan_to_num(x.detach().float()).clamp(-9, 9).to(torch.int8).reshape(1, -1),
            torch.full((1, x.numel()), 0.5),
            torch.zeros(1, x.numel(), dtype=torch.int8),
            1,
            1,
        ),
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "quantize dequantize, export",
        QUANTIZE_DEQUANTIZE,
        lambda x: (x, 0.1, 3, 0, 15, "site"),
        grads=(),
    ),
    Case("bind", BIND, lambda x: ("key", [1], [x]), grads=(), elementwise=False, fuses=False, takes_x=False),
]
