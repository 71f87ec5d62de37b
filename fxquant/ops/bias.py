"""The bias of an integer kernel: added to the sums of products, so in their units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.ops.library import define

BIAS_MAX = 2.0**31 - 1  # in float32 it is 2³¹


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """``round(bias / scale)``, in float32 or wider."""
    return torch.round(bias.to(torch.promote_types(bias.dtype, torch.float32)) / scale)


def _round(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    scale = input_scale * weight_scale
    code = bias_codes(bias, scale)
    return torch.where(code.abs() < BIAS_MAX, code * scale, bias).to(bias.dtype)


def _like(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty_like(bias)


def _straight_through(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return {"bias": grad}


FAKE_QUANTIZE_BIAS = define(
    "fake_quantize_bias(Tensor bias, Tensor input_scale, Tensor weight_scale) -> Tensor",
    _round,
    fake=_like,
    backward=_straight_through,
    saves=(),
)


def fake_quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """``round(b / s) · s`` with ``s = input_scale · weight_scale``: what an int32 bias of an integer kernel adds.

    Such a kernel sums products of codes, each worth ``input_scale · weight_scale``, and adds the bias to the sum as a
    code of 32 bits (ONNX QLinearConv). A bias that 32 bits do not hold, beside a weight that all but vanished, stays
    as it is: the export gives such a weight a larger scale. ``bias`` has shape [C], the scales [1] or [C]; arithmetic
    in float32, or in float64 where the bias is. The gradient passes straight through.
    """
    return FAKE_QUANTIZE_BIAS(bias, input_scale, weight_scale)


__all__ = ["FAKE_QUANTIZE_BIAS", "fake_quantize_bias"]
