"""Cases of the affine family with codes that are small floats, of their codes in bytes and of scales of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.ops.elements import DEQUANTIZE_ELEMENTS, QUANTIZE_ELEMENTS
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_CHANNEL_BACKWARD, PER_TENSOR, PER_TENSOR_BACKWARD
from fxquant.ops.qdq import QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.ops.qparams import AFFINE_QPARAMS, BLOCK_QPARAMS
from fxquant.ops.saved import CLIP_MASK
from tests.ops.cases import Case
from tests.ops.cases_affine import many, one, ranges

DIVIDE = {"rounding": "divide"}
FP8 = {**DIVIDE, "element": "e4m3"}
FP4 = {"element": "e2m1"}


def codes(x: Tensor) -> Tensor:
    return (torch.nan_to_num(x.float()).abs() * 8).clamp(max=15).to(torch.int32).to(torch.uint8)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, 8)


CASES = [
    Case("elements, per tensor", PER_TENSOR, lambda x: (x, *one(x, point=0), -448, 448), FP8),
    Case(
        "elements, per channel", PER_CHANNEL, lambda x: (x, *many(x, 1), 1, -6, 6), {**DIVIDE, **FP4}, elementwise=False
    ),
    Case(
        "elements backward, per tensor",
        PER_TENSOR_BACKWARD,
        lambda x: (x, x.detach() * 0.5, *one(x, point=0), -448, 448),
        FP8,
        grads=("grad",),
    ),
    Case(
        "elements backward, per channel",
        PER_CHANNEL_BACKWARD,
        lambda x: (x, x.detach() * 0.5, *many(x, 1), 1, -6, 6),
        {**DIVIDE, **FP4},
        grads=("grad",),
        elementwise=False,
    ),
    Case("elements, clip mask", CLIP_MASK, lambda x: (x, *one(x, point=0), -448, 448), FP8, grads=()),
    Case("elements, quantize", QUANTIZE_ELEMENTS, lambda x: (x, one(x)[0], None, "e4m3"), DIVIDE, grads=()),
    Case(
        "elements, quantize, axis",
        QUANTIZE_ELEMENTS,
        lambda x: (x, many(x, 1)[0], 1, "e2m1"),
        {"rounding": "reciprocal"},
        grads=(),
        elementwise=False,
    ),
    Case(
        "elements, dequantize",
        DEQUANTIZE_ELEMENTS,
        lambda x: (codes(x), one(x)[0], None, "e5m2"),
        {"dtype": torch.bfloat16},
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "affine qparams, element",
        AFFINE_QPARAMS,
        lambda x: (*ranges(x), -7, 7, True),
        {"element": "e2m3"},
        grads=(),
        takes_x=False,
        elementwise=False,
    ),
    Case(
        "block qparams, e8m0",
        BLOCK_QPARAMS,
        lambda x: (rows(x), None, 448, "e8m0"),
        {"element": "e4m3"},
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "block qparams, e4m3",
        BLOCK_QPARAMS,
        lambda x: (rows(x), torch.tensor([2.0], device=x.device), 6, "e4m3"),
        {"element": "e2m1"},
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "quantize_dequantize, blocks",
        QUANTIZE_DEQUANTIZE_BLOCKS,
        lambda x: (x, 8, -6, 6, True, "e2m1", "e4m3", 2.0, "site"),
        grads=(),
        elementwise=False,
    ),
    Case(
        "quantize_dequantize, tokens with zero points",
        QUANTIZE_DEQUANTIZE_BLOCKS,
        lambda x: (x, -1, 0, 15, False, None, None, None, "site"),
        grads=(),
        elementwise=False,
    ),
]
