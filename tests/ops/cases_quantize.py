"""Cases of codes in real integer dtypes, and of 4-bit packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.ops.int4 import PACK_INT4, UNPACK_INT4
from fxquant.ops.quantize import (
    DEQUANTIZE_CHANNEL,
    DEQUANTIZE_NUMBERS,
    DEQUANTIZE_TENSOR,
    QUANTIZE_CHANNEL,
    QUANTIZE_NUMBERS,
    QUANTIZE_TENSOR,
)
from tests.ops.cases import Case
from tests.ops.cases_affine import DIVIDE, floating, many, one

RECIPROCAL = {"rounding": "reciprocal"}


def codes(x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Codes from 0 to 7 that follow x."""
    return (torch.nan_to_num(x.float()).abs().clamp(max=7)).to(torch.int32).to(dtype)


def quantizing(name: str, op: Any, args: Callable[[Tensor], tuple[Any, ...]], kwargs: dict[str, Any]) -> Case:
    return Case(name, op, args, kwargs, grads=(), elementwise=op is not QUANTIZE_CHANNEL)


def dequantizing(
    name: str,
    op: Any,
    args: Callable[[Tensor], tuple[Any, ...]],
    *grads: str,
    dtype: torch.dtype = torch.float32,
) -> Case:
    return Case(name, op, args, {"dtype": dtype}, grads=grads, elementwise=False, takes_x=False)


CASES = [
    quantizing("quantize, numbers", QUANTIZE_NUMBERS, lambda x: (x, 0.1, 3, 0, 15, torch.uint8), DIVIDE),
    quantizing("quantize, numbers, int16", QUANTIZE_NUMBERS, lambda x: (x, 0.1, 0, -8, 7, torch.int16), RECIPROCAL),
    quantizing("quantize", QUANTIZE_TENSOR, lambda x: (x, *one(x), -128, 127), {}),
    quantizing("quantize, uint16", QUANTIZE_TENSOR, lambda x: (x, *one(x), 0, 65535, torch.uint16), {}),
    quantizing(
        "quantize, int32", QUANTIZE_TENSOR, lambda x: (x, *one(x, 1e-9), -(2**31), 2**31 - 1, torch.int32), RECIPROCAL
    ),
    quantizing("quantize, axis", QUANTIZE_CHANNEL, lambda x: (x, *many(x, 1), 1, -8, 7), DIVIDE),
    quantizing("quantize, axis, reciprocal", QUANTIZE_CHANNEL, lambda x: (x, *many(x, 2), 2, -8, 7), RECIPROCAL),
    quantizing(
        "quantize, axis, float points",
        QUANTIZE_CHANNEL,
        lambda x: (x, *floating(many(x, 1)), 1, 0, 15, torch.uint8),
        RECIPROCAL,
    ),
    dequantizing("dequantize, numbers", DEQUANTIZE_NUMBERS, lambda x: (codes(x), 0.1, 3)),
    dequantizing("dequantize", DEQUANTIZE_TENSOR, lambda x: (codes(x), *one(x)), "scale", dtype=torch.bfloat16),
    dequantizing("dequantize, uint16", DEQUANTIZE_TENSOR, lambda x: (codes(x, torch.uint16), *one(x)), "scale"),
    dequantizing(
        "dequantize, axis", DEQUANTIZE_CHANNEL, lambda x: (codes(x), *many(x, 1), 1), "scale", dtype=torch.float64
    ),
    dequantizing(
        "dequantize, axis, float points",
        DEQUANTIZE_CHANNEL,
        lambda x: (codes(x, torch.int32), *floating(many(x, 1)), 1),
        "scale",
        "zero_point",
    ),
    Case("pack int4", PACK_INT4, lambda x: (codes(x),), grads=(), elementwise=False, takes_x=False),
    Case("unpack int4", UNPACK_INT4, lambda x: (codes(x, torch.uint8), 15), grads=(), elementwise=False, takes_x=False),
    Case(
        "unpack uint4",
        UNPACK_INT4,
        lambda x: (codes(x, torch.uint8), 16, False),
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
]
if hasattr(torch, "int4"):
    CASES += [
        Case(
            "quantize, int4",
            QUANTIZE_TENSOR,
            lambda x: (x, *one(x), -8, 7, torch.int4),
            grads=(),
            elementwise=False,
        ),
        Case(
            "quantize, axis, uint4",
            QUANTIZE_CHANNEL,
            lambda x: (x, *many(x, 1), 1, 0, 15, torch.uint4),
            grads=(),
            elementwise=False,
        ),
    ]
