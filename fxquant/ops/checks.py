"""Argument checks that operators share. Types, order and words are torch's where torch has the same check."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxquant.numerics.division import ROUNDINGS

_SCALAR_TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
}


def scalar_type(dtype: torch.dtype) -> str:
    """The dtype as torch's own messages name it: ``Float``, ``Long``, …"""
    return _SCALAR_TYPES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """``torch.int8, torch.uint8``, for a message."""
    return ", ".join(str(dtype) for dtype in dtypes)


def check_range(quant_min: int, quant_max: int) -> None:
    """A range holds at least one code."""
    if quant_min > quant_max:
        raise RuntimeError(f"`quant_min` should be less than or equal to `quant_max`: got {quant_min} and {quant_max}.")


def check_rounding(rounding: str) -> None:
    """The name of a way to round."""
    if rounding not in ROUNDINGS:
        raise RuntimeError(f"`rounding` must be one of {ROUNDINGS}: got {rounding!r}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """What is quantized is a floating tensor: integers have no fraction to round, and no gradient."""
    if not tensor.is_floating_point():
        found = scalar_type(tensor.dtype)
        raise NotImplementedError(  # torch's type: a RuntimeError too
            f"`{name}` must be a floating-point tensor: got {found} (not implemented for '{found}'). "
            "Convert it with .float()."
        )


def can_read(tensor: Tensor) -> bool:
    """Whether an eager kernel may look at values: not where that would make the host wait for a device."""
    return tensor.device.type == "cpu" and tensor.numel() > 0


def assert_values(condition: Tensor, message: str) -> None:
    """``check=True``: raises RuntimeError unless every element holds, from compiled code too.

    A data-dependent assertion that stays in the graph: no graph break, and no host read before it fails.
    """
    torch._assert_async(condition.all(), message)
