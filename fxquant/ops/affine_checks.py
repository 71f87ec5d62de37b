"""What the affine operators check of their arguments: dtypes, lengths, ranges, values where they can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.division import Rounding
from fxquant.ops.checks import can_read, check_floating, check_range, check_rounding, scalar_type

_INPUTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ZERO_POINTS = (torch.int32, torch.int64, torch.float32, torch.float16)
_AXIS = "`axis` must be between 0 and number of dimensions of"
ZERO_POINT_RANGE = "`zero_point` must be between `quant_min` and `quant_max`"


def _check_input(x: Tensor) -> None:
    check_floating("input", x)
    if x.dtype not in _INPUTS:  # 8-bit floats: torch has no arithmetic on them
        raise NotImplementedError(f"`input` must be wider than 8 bits: not implemented for '{scalar_type(x.dtype)}'.")


def check_qparams(scale: Tensor, zero_point: Tensor) -> None:
    """The dtypes that torch's per-channel kernels take, and int64 zero points."""
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"Scale must be Float or BFloat16, found {scalar_type(scale.dtype)}.")
    if zero_point.dtype not in _ZERO_POINTS:
        raise RuntimeError(
            f"Zero-point must be Int32, Float or Half, found {scalar_type(zero_point.dtype)} (Long is accepted too)."
        )


def _check_lengths(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> None:
    if scale.dim() != 1:
        raise RuntimeError(f"scale should be a 1-D tensor: got shape {tuple(scale.shape)}.")
    if zero_point.dim() != 1:
        raise RuntimeError(f"zero point should be a 1-D tensor: got shape {tuple(zero_point.shape)}.")
    if scale.shape[0] != zero_point.shape[0]:
        raise RuntimeError(
            "scale and zero-point need to have the same dimensions: "
            f"got {scale.shape[0]} and {zero_point.shape[0]} elements."
        )
    try:
        slices = x.size(axis)
    except IndexError as error:
        raise IndexError(f"{_AXIS} {name}: got {axis} of {x.dim()}. {error}.") from None
    if scale.shape[0] != slices:
        raise RuntimeError(
            f"dimensions of scale and zero-point are not consistent with {name} tensor: "
            f"got {scale.shape[0]} of each for {slices} slices of axis {axis}."
        )


def _check_place(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> None:
    if axis < 0:  # torch comes to this last, having counted it from the end before
        raise RuntimeError(f"{_AXIS} {name}: got {axis} of {x.dim()}.")
    for what, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.device != x.device:
            _refuse_device(what, tensor, x, name)


def _refuse_device(what: str, tensor: Tensor, x: Tensor, name: str = "input") -> None:
    raise RuntimeError(
        f"`{what}` must be on the device of `{name}`: got {tensor.device} and {x.device}. "
        f"Move it with .to({str(x.device)!r})."
    )


def check_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> None:
    """Scale and zero point are one vector each, as long as ``axis`` of the argument called ``name``."""
    _check_lengths(x, scale, zero_point, axis, name)
    _check_place(x, scale, zero_point, axis, name)


def _refuse_zero_point(zero_point: object, quant_min: int, quant_max: int) -> None:
    raise RuntimeError(f"{ZERO_POINT_RANGE}: got {zero_point}, not in [{quant_min}, {quant_max}].")


def check_channel_zero_points(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
    pass_through: bool = False,
    scale_gradient: float = 0.0,
    element: str | None = None,
    error_gradient: bool = True,
) -> None:
    """Values, where a look is free; torch leaves floating ones unchecked too."""
    _channel_qparams(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    if can_read(zero_point) and not zero_point.is_floating_point():
        outside = zero_point[(zero_point < quant_min) | (zero_point > quant_max)]
        if outside.numel():
            _refuse_zero_point(outside[0].item(), quant_min, quant_max)


def _channel_qparams(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int, rounding: str
) -> None:
    check_rounding(rounding)
    check_qparams(scale, zero_point)
    _check_lengths(x, scale, zero_point, axis, "input")
    check_range(quant_min, quant_max)


def per_channel_arguments(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int, rounding: str
) -> None:
    """Checks what shapes, dtypes and numbers of a per-channel call show, in torch's order."""
    _channel_qparams(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    _check_place(x, scale, zero_point, axis, "input")
    _check_input(x)


def per_tensor_qparams(scale: Tensor, zero_point: Tensor) -> None:
    """One scale and zero point, each a tensor of one element."""
    check_qparams(scale, zero_point)
    for name, tensor in (("zero_point", zero_point), ("scale", scale)):
        if tensor.numel() != 1:
            raise RuntimeError(
                f"{name} must be a 1-element tensor: got shape {tuple(tensor.shape)}; "
                f"a Tensor with {tensor.numel()} elements cannot be converted to Scalar."
            )


def per_tensor_arguments(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, rounding: str
) -> None:
    """`per_channel_arguments` for one scale and zero point, which may be a CPU's, as torch lets numbers be."""
    check_rounding(rounding)
    check_range(quant_min, quant_max)
    per_tensor_qparams(scale, zero_point)
    for what, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.device not in (x.device, torch.device("cpu")):
            _refuse_device(what, tensor, x)
    _check_input(x)


def scalar_arguments(x: Tensor, zero_point: int, quant_min: int, quant_max: int, rounding: str) -> None:
    """The same for numbers, whose zero point shows its value."""
    check_rounding(rounding)
    check_range(quant_min, quant_max)
    if not quant_min <= zero_point <= quant_max:
        _refuse_zero_point(zero_point, quant_min, quant_max)
    _check_input(x)
