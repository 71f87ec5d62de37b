"""``fxquant::{quantize,dequantize}_per_{tensor,channel}``: codes in real integer dtypes.

The code of `fake_quantize` and its way back, as two ops with an int8, uint8, int16, uint16 or int32 tensor between
them. ``rounding="divide"`` (the default here) gives the codes of ONNX QuantizeLinear. The arithmetic is
`fxquant.numerics.integer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import integer
from fxquant.numerics.division import Rounding
from fxquant.ops.affine_checks import (
    check_channel_zero_points,
    check_channels,
    check_qparams,
    per_channel_arguments,
    per_tensor_arguments,
    per_tensor_qparams,
    scalar_arguments,
)
from fxquant.ops.checks import dtype_names, scalar_type
from fxquant.ops.fake_quantize import scale_tensor
from fxquant.ops.int4 import check_last_axis
from fxquant.ops.library import define, same_arguments

# Shell dtypes: torch has no tensors of them that compute, so their codes travel two in a byte.
_PACKED = {
    dtype: limits
    for name, limits in (("int4", (-8, 7)), ("uint4", (0, 15)))
    if (dtype := getattr(torch, name, None)) is not None
}
_LIMITS = {
    **{dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in (torch.int8, torch.uint8, torch.int16)},
    torch.uint16: (0, 65535),
    torch.int32: (torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max),
    **_PACKED,
}
_CODES = tuple(dtype for dtype in _LIMITS if dtype not in _PACKED)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_dtype(x: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
    if dtype not in _LIMITS:
        raise RuntimeError(f"`dtype` must be one of {dtype_names(_LIMITS)}: got {dtype}.")
    low, high = _LIMITS[dtype]
    if quant_min < low or quant_max > high:
        raise RuntimeError(
            f"`quant_min` and `quant_max` must fit {dtype}: got [{quant_min}, {quant_max}], not in [{low}, {high}]. "
            "Give a wider dtype or a smaller range."
        )
    if dtype in _PACKED:
        check_last_axis("input", x)


def _check_code(code: Tensor, dtype: torch.dtype) -> None:
    if code.dtype not in _CODES:
        raise RuntimeError(
            f"`code` must have one of the dtypes {dtype_names(_CODES)}: got {code.dtype}. "
            "Packed 4-bit codes go through unpack_int4 first."
        )
    if dtype not in _FLOATS:
        raise RuntimeError(f"`dtype` must be one of {dtype_names(_FLOATS)}: got {dtype}.")


def _stored(code: Tensor, quantized: torch.dtype) -> Tensor:
    return integer.pack_nibbles(code) if quantized in _PACKED else code


def _held(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a code has before it is packed."""
    return torch.int8 if dtype in _PACKED else dtype


def _point(zero_point: int, device: torch.device) -> Tensor | None:
    return torch.full((), zero_point, dtype=torch.int32, device=device) if zero_point else None


def _quantize_numbers(
    x: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: Rounding = "divide",
) -> Tensor:
    scalar_arguments(x, zero_point, quant_min, quant_max, rounding)
    _check_dtype(x, quant_min, quant_max, dtype)
    step, point = scale_tensor(scale, x.device), _point(zero_point, x.device)
    code = integer.quantize_per_tensor(x, step, point, quant_min, quant_max, _held(dtype), rounding)
    return _stored(code, dtype)


def _quantize_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: Rounding = "divide",
) -> Tensor:
    per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, rounding)
    _check_dtype(x, quant_min, quant_max, dtype)
    scale, point = scale.reshape(()), zero_point.reshape(())
    code = integer.quantize_per_tensor(x, scale, point, quant_min, quant_max, _held(dtype), rounding)
    return _stored(code, dtype)


def _quantize_channel(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: Rounding = "divide",
) -> Tensor:
    per_channel_arguments(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    if rounding == "divide" and zero_point.is_floating_point():
        raise RuntimeError(
            f"`zero_point` must be an integer tensor with rounding='divide': got {scalar_type(zero_point.dtype)}. "
            "Round it, or take rounding='reciprocal', which rounds after the zero point."
        )
    _check_dtype(x, quant_min, quant_max, dtype)
    code = integer.quantize_per_channel(x, scale, zero_point, axis, quant_min, quant_max, _held(dtype), rounding)
    return _stored(code, dtype)


def _check_points(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: Rounding = "divide",
) -> None:
    check_channel_zero_points(x, scale, zero_point, axis, quant_min, quant_max, rounding=rounding)


def _dequantize_numbers(code: Tensor, scale: float, zero_point: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    _check_code(code, dtype)
    return integer.dequantize_per_tensor(code, scale_tensor(scale, code.device), _point(zero_point, code.device), dtype)


def _dequantize_tensor(
    code: Tensor, scale: Tensor, zero_point: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    _check_code(code, dtype)
    per_tensor_qparams(scale, zero_point)
    return integer.dequantize_per_tensor(code, scale.reshape(()), zero_point.reshape(()), dtype)


def _dequantize_channel(
    code: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    _check_code(code, dtype)
    check_qparams(scale, zero_point)
    check_channels(code, scale, zero_point, axis, "code")
    return integer.dequantize_per_channel(code, scale, zero_point, axis, dtype)


def _backward_tensor(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return integer.dequantize_backward(grad, a.code, a.scale, a.zero_point.reshape(()), None)


def _backward_channel(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return integer.dequantize_backward(grad, a.code, a.scale, a.zero_point, a.axis)


_RANGE = 'int quant_min, int quant_max, ScalarType dtype=int8, *, str rounding="divide"'
_FLOAT = "*, ScalarType dtype=float"


def _lift_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[Any, ...]:
    if dtype in _PACKED:
        check_last_axis("input", x[0])
    return x, scale, zero_point, quant_min, quant_max, dtype


def _lift_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *rest: Any) -> tuple[Any, ...]:
    return x, scale, zero_point, axis + 1, *rest


QUANTIZE_NUMBERS = define(
    f"quantize_per_tensor(Tensor input, float scale, int zero_point, {_RANGE}) -> Tensor",
    _quantize_numbers,
    lift=_lift_quantize,
)
QUANTIZE_TENSOR = define(
    f"quantize_per_tensor.tensor_qparams(Tensor input, Tensor scale, Tensor zero_point, {_RANGE}) -> Tensor",
    _quantize_tensor,
    lift=_lift_quantize,
)
QUANTIZE_CHANNEL = define(
    f"quantize_per_channel(Tensor input, Tensor scale, Tensor zero_point, int axis, {_RANGE}) -> Tensor",
    _quantize_channel,
    check=_check_points,
    lift=_lift_channels,
)
DEQUANTIZE_NUMBERS = define(
    f"dequantize_per_tensor(Tensor code, float scale, int zero_point, {_FLOAT}) -> Tensor",
    _dequantize_numbers,
    lift=same_arguments,
)
DEQUANTIZE_TENSOR = define(
    f"dequantize_per_tensor.tensor_qparams(Tensor code, Tensor scale, Tensor zero_point, {_FLOAT}) -> Tensor",
    _dequantize_tensor,
    backward=_backward_tensor,
    lift=same_arguments,
)
DEQUANTIZE_CHANNEL = define(
    f"dequantize_per_channel(Tensor code, Tensor scale, Tensor zero_point, int axis, {_FLOAT}) -> Tensor",
    _dequantize_channel,
    backward=_backward_channel,
    lift=_lift_channels,
)
QUANTIZE = (QUANTIZE_NUMBERS, QUANTIZE_TENSOR, QUANTIZE_CHANNEL)
DEQUANTIZE = (DEQUANTIZE_NUMBERS, DEQUANTIZE_TENSOR, DEQUANTIZE_CHANNEL)


def quantize_per_tensor(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: str = "divide",
) -> Tensor:
    """The codes of a tensor under one scale and zero point, as integers.

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``, halves to even

    Args:
        input: float32, float64, float16 or bfloat16, of any shape. NaN becomes ``quant_min``, ±inf an end.
        scale: a number, or one element of float32 or bfloat16; not checked.
        zero_point: a number in the range, or one element of int32, int64, float32 or float16 (its integer part).
        quant_min: the lowest code; both ends must fit ``dtype``.
        quant_max: the highest.
        dtype: int8, uint8, int16, uint16 or int32: the result has input's shape. int4 or uint4: the result is uint8
            as `pack_int4` gives it, two codes a byte along the last axis.
        rounding: ``"divide"`` as ONNX QuantizeLinear, ``"reciprocal"`` as torch's fake-quantize.

    `dequantize_per_tensor` of the codes gives the bits of `fake_quantize_per_tensor_affine`. No gradient: integers.

    Raises RuntimeError for what fake-quantize refuses, and for a range that ``dtype`` does not hold.

    Source: ONNX QuantizeLinear-21.

    >>> quantize_per_tensor(torch.tensor([0.24, 9.0, float("nan")]), 0.1, 3, 0, 15, torch.uint8)
    tensor([ 5, 15,  0], dtype=torch.uint8)
    """
    _check_kinds(scale, zero_point)
    op = QUANTIZE_TENSOR if isinstance(scale, Tensor) else QUANTIZE_NUMBERS
    return op(input, scale, zero_point, quant_min, quant_max, dtype, rounding=rounding)


def quantize_per_channel(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: str = "divide",
) -> Tensor:
    """The codes of a tensor under a scale and zero point for each slice of ``axis``, as integers.

    ``q[c] = clamp(round(x[c] / scale[c]) + zero_point[c], quant_min, quant_max)``, halves to even

    Args:
        input: as in `quantize_per_tensor`; so are ``quant_min``, ``quant_max``, ``dtype`` and ``rounding``.
        scale: float32 or bfloat16, 1-D, one element per slice; not checked.
        zero_point: the same number of int32 or int64, each in the range (looked at on CPU). Floating ones go with
            ``rounding="reciprocal"`` only.
        axis: counted from the front.

    `dequantize_per_channel` of the codes gives the bits of `fake_quantize_per_channel_affine`, but for one case:
    "reciprocal" takes float16 and bfloat16 through a double product there, as torch does, and not here.
    No gradient: integers. NaN becomes ``quant_min``; with "reciprocal" so does +inf, as in torch.

    Raises RuntimeError and IndexError for what fake-quantize refuses, and for a range that ``dtype`` does not hold.

    Source: ONNX QuantizeLinear-21.

    >>> rows = torch.tensor([[0.24, 9.0], [0.24, 9.0]])
    >>> quantize_per_channel(rows, torch.tensor([0.1, 1.0]), torch.zeros(2, dtype=torch.int32), 0, -8, 7)
    tensor([[2, 7],
            [0, 7]], dtype=torch.int8)
    """
    return QUANTIZE_CHANNEL(input, scale, zero_point, axis, quant_min, quant_max, dtype, rounding=rounding)


def dequantize_per_tensor(
    code: Tensor, scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of integer codes under one scale and zero point.

    ``y = (q − zero_point) · scale`` in float32, rounded once more to ``dtype``

    Args:
        code: int8, uint8, int16, uint16 or int32, of any shape, which the result has. 4-bit codes: `unpack_int4`.
        scale: a number, or one element of float32 or bfloat16.
        zero_point: a number, or one element of int32, int64, float32 or float16 (its integer part).
        dtype: float32, float64, float16 or bfloat16.

    Gradient: to a scale given as a tensor, ``Σ dy · (q − zero_point)``, so that scales of frozen integer weights can
    be trained; none to the zero point.

    Raises RuntimeError for a code that is not of these dtypes and for qparams of more than one element.

    Source: ONNX DequantizeLinear-21.

    >>> dequantize_per_tensor(torch.tensor([5, 15], dtype=torch.uint8), 0.5, 3)
    tensor([1., 6.])
    """
    _check_kinds(scale, zero_point)
    op = DEQUANTIZE_TENSOR if isinstance(scale, Tensor) else DEQUANTIZE_NUMBERS
    return op(code, scale, zero_point, dtype=dtype)


def dequantize_per_channel(
    code: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of integer codes under a scale and zero point for each slice of ``axis``.

    ``y[c] = (q[c] − zero_point[c]) · scale[c]`` in float32 (float64 and floating zero points: double), then ``dtype``

    Args:
        code: as in `dequantize_per_tensor`; so is ``dtype``.
        scale: float32 or bfloat16, 1-D, one element per slice.
        zero_point: the same number of int32, int64, float32 or float16, fractions included.
        axis: counted from the front.

    Gradient: to the scales, ``Σ dy · (q − zero_point)`` over each slice, and to floating zero points,
    ``−Σ dy · scale``.

    Raises RuntimeError and IndexError for what fake-quantize refuses in scale, zero point and axis.

    Source: ONNX DequantizeLinear-21.

    >>> code = torch.tensor([[2, 7], [0, 7]], dtype=torch.int8)
    >>> dequantize_per_channel(code, torch.tensor([0.5, 1.0]), torch.zeros(2, dtype=torch.int32), 0)
    tensor([[1.0000, 3.5000],
            [0.0000, 7.0000]])
    """
    return DEQUANTIZE_CHANNEL(code, scale, zero_point, axis, dtype=dtype)


def _check_kinds(scale: float | Tensor, zero_point: int | Tensor) -> None:
    if isinstance(scale, Tensor) != isinstance(zero_point, Tensor):
        raise RuntimeError("scale and zero_point must both be numbers or both be tensors.")
