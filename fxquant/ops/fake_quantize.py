"""``fxquant::fake_quantize_{per_tensor,per_channel}_affine``: quantize and dequantize in one op.

y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) − zero_point) · scale, with the gradient of the
clipped straight-through estimator: dx = dy where the code lies in the range, 0 elsewhere; none to scale and
zero_point. Equal to torch's CPU kernels bit for bit with ``rounding="reciprocal"`` (the default), and to ONNX
QuantizeLinear → DequantizeLinear with ``rounding="divide"``. The arithmetic is `fxquant.numerics`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.numerics import learnable
from fxquant.numerics.division import Rounding
from fxquant.ops.checks import assert_values, can_read, check_floating, check_range, check_rounding, scalar_type
from fxquant.ops.library import define, same_arguments

_INPUTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ZERO_POINTS = (torch.int32, torch.int64, torch.float32, torch.float16)
_AXIS = "`axis` must be between 0 and number of dimensions of"
_POINT = "`zero_point` must be between `quant_min` and `quant_max`"


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
            raise RuntimeError(
                f"`{what}` must be on the device of `{name}`: got {tensor.device} and {x.device}. "
                f"Move it with .to({str(x.device)!r})."
            )


def check_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> None:
    """Scale and zero point are one vector each, as long as ``axis`` of the argument called ``name``."""
    _check_lengths(x, scale, zero_point, axis, name)
    _check_place(x, scale, zero_point, axis, name)


def _refuse_zero_point(zero_point: object, quant_min: int, quant_max: int) -> None:
    raise RuntimeError(f"{_POINT}: got {zero_point}, not in [{quant_min}, {quant_max}].")


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
    """`per_channel_arguments` for one scale and zero point."""
    check_rounding(rounding)
    check_range(quant_min, quant_max)
    per_tensor_qparams(scale, zero_point)
    _check_input(x)


def scalar_arguments(x: Tensor, zero_point: int, quant_min: int, quant_max: int, rounding: str) -> None:
    """The same for numbers, whose zero point shows its value."""
    check_rounding(rounding)
    check_range(quant_min, quant_max)
    if not quant_min <= zero_point <= quant_max:
        _refuse_zero_point(zero_point, quant_min, quant_max)
    _check_input(x)


def _per_tensor_scalar(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, *, rounding: Rounding = "reciprocal"
) -> Tensor:
    scalar_arguments(x, zero_point, quant_min, quant_max, rounding)
    point = torch.full((), zero_point, dtype=torch.int32, device=x.device) if zero_point else None
    return numerics.fake_quantize_per_tensor(x, scale_tensor(scale, x.device), point, quant_min, quant_max, rounding)


def scale_tensor(scale: float, device: torch.device) -> Tensor:
    """A number as float32; rounded here, since a compiler that folds the constant would promote the unrounded one."""
    rounded = ctypes.c_float(scale).value if isinstance(scale, float) else scale
    return torch.full((), rounded, dtype=torch.float32, device=device)


def _per_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
    pass_through: bool = False,
    scale_gradient: float = 0.0,
) -> Tensor:
    per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, rounding)
    scale, point = scale.reshape(()), zero_point.reshape(())
    return numerics.fake_quantize_per_tensor(x, scale, point, quant_min, quant_max, rounding)


def _per_channel(
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
) -> Tensor:
    per_channel_arguments(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    return numerics.fake_quantize_per_channel(x, scale, zero_point, axis, quant_min, quant_max, rounding)


def _per_tensor_grad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
) -> Tensor:
    scale, point = scale.reshape(()), zero_point.reshape(())
    return numerics.fake_quantize_per_tensor_backward(grad, x, scale, point, quant_min, quant_max, rounding)


def _per_channel_grad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
) -> Tensor:
    return numerics.fake_quantize_per_channel_backward(grad, x, scale, zero_point, axis, quant_min, quant_max, rounding)


# The backward ops are linear in `grad`, so their own gradient is themselves, applied to the new one.
def _backward_per_tensor(a: Any, grad: Tensor) -> dict[str, Tensor]:
    if getattr(a, "pass_through", False):
        return {"input": grad}
    found = PER_TENSOR_BACKWARD(grad, a.input, a.scale, a.zero_point, a.quant_min, a.quant_max, rounding=a.rounding)
    return {"input": found, **_to_scale(a, grad, None)}


def _to_scale(a: Any, grad: Tensor, axis: int | None) -> dict[str, Tensor]:
    """The gradient of the scale where it is asked for: LSQ's (Esser et al., 2020), times the factor given."""
    factor = getattr(a, "scale_gradient", 0.0)
    if not factor:
        return {}
    point = a.zero_point.to(a.scale.dtype)
    limits = (a.quant_min, a.quant_max)
    found = learnable.learnable_affine_backward(grad, a.input, a.scale, point, axis, *limits, factor, a.rounding)
    return {"scale": found[1]}


def _backward_scalar(a: Any, grad: Tensor) -> dict[str, Tensor]:
    a.scale = scale_tensor(a.scale, a.input.device)
    a.zero_point = torch.full((), a.zero_point, dtype=torch.int32, device=a.input.device)
    return _backward_per_tensor(a, grad)


def _backward_per_channel(a: Any, grad: Tensor) -> dict[str, Tensor]:
    if getattr(a, "pass_through", False):
        return {"input": grad}
    found = PER_CHANNEL_BACKWARD(
        grad, a.input, a.scale, a.zero_point, a.axis, a.quant_min, a.quant_max, rounding=a.rounding
    )
    return {"input": found, **_to_scale(a, grad, a.axis)}


_TENSOR = "Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_CHANNEL = "Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max"
_ROUNDING = '*, str rounding="reciprocal"'
# pass_through: the caller knows that no code lies outside the range, so the gradient is dy, and nothing is kept for it.
# scale_gradient: for scales that are trained, the factor of the gradient that they receive; 0 for none, as in torch.
_FORWARD = f"{_ROUNDING}, bool pass_through=False, float scale_gradient=0."
_SAVED = ("input", "scale", "zero_point")

PER_TENSOR_SCALAR = define(
    "fake_quantize_per_tensor_affine(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
    f"{_ROUNDING}) -> Tensor",
    _per_tensor_scalar,
    backward=_backward_scalar,
    lift=same_arguments,
)
PER_TENSOR = define(
    f"fake_quantize_per_tensor_affine.tensor_qparams(Tensor input, {_TENSOR}, {_FORWARD}) -> Tensor",
    _per_tensor,
    backward=_backward_per_tensor,
    lift=same_arguments,
)
PER_CHANNEL = define(
    f"fake_quantize_per_channel_affine(Tensor input, {_CHANNEL}, {_FORWARD}) -> Tensor",
    _per_channel,
    check=check_channel_zero_points,
    backward=_backward_per_channel,
    lift=lambda x, scale, point, axis, *rest: (x, scale, point, axis + 1, *rest),
)
PER_TENSOR_BACKWARD = define(
    f"fake_quantize_per_tensor_affine_backward(Tensor grad, Tensor input, {_TENSOR}, {_ROUNDING}) -> Tensor",
    _per_tensor_grad,
    backward=lambda a, grad: {"grad": _backward_per_tensor(a, grad)["input"]},
    saves=_SAVED,
)
PER_CHANNEL_BACKWARD = define(
    f"fake_quantize_per_channel_affine_backward(Tensor grad, Tensor input, {_CHANNEL}, {_ROUNDING}) -> Tensor",
    _per_channel_grad,
    backward=lambda a, grad: {"grad": _backward_per_channel(a, grad)["input"]},
    saves=_SAVED,
)

FAKE_QUANTIZE = (PER_TENSOR_SCALAR, PER_TENSOR, PER_CHANNEL)
BACKWARD = (PER_TENSOR_BACKWARD, PER_CHANNEL_BACKWARD)


def assert_zero_points(zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    """``check=True``: integer zero points are codes."""
    if not zero_point.is_floating_point():
        inside = (zero_point >= quant_min) & (zero_point <= quant_max)
        assert_values(inside, f"{_POINT}: got one outside [{quant_min}, {quant_max}].")


def fake_quantize_per_tensor_affine(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: str = "reciprocal",
    check: bool = False,
) -> Tensor:
    """Fake-quantizes with one scale and zero point, as numbers or as one-element tensors.

    ``y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) − zero_point) · scale``

    Args:
        input: float32, float64, float16 or bfloat16, of any shape; the result has both. NaN gives the value of
            ``quant_min``.
        scale: a number, or one element of float32 or bfloat16. Not checked: 0, negative ones and NaN follow IEEE.
        zero_point: a number, or one element of int32, int64, float32 or float16, of which the integer part counts.
        rounding: ``"reciprocal"`` multiplies by 1 / scale as torch does, ``"divide"`` divides as ONNX does.
        check: whether a zero point in an integer tensor must be in the range too, compiled and on every device.

    Gradient: ``dx = dy`` where the code lies in the range, 0 elsewhere and for NaN; none to the others.

    Raises:
        RuntimeError: an empty range, or a zero point outside it; in torch's order, with torch's words.
        NotImplementedError: ``input`` is not floating.

    Source: ``torch.fake_quantize_per_tensor_affine``, whose CPU kernels it equals bit for bit.

    >>> fake_quantize_per_tensor_affine(torch.tensor([0.24, 9.0]), 0.1, 0, -128, 127, rounding="divide")
    tensor([0.2000, 9.0000])
    """
    if isinstance(scale, Tensor) != isinstance(zero_point, Tensor):
        raise RuntimeError("scale and zero_point must both be numbers or both be tensors.")
    op = PER_TENSOR if isinstance(scale, Tensor) else PER_TENSOR_SCALAR
    y = op(input, scale, zero_point, quant_min, quant_max, rounding=rounding)
    if check and isinstance(zero_point, Tensor):  # after the op, which complains about all else first
        assert_zero_points(zero_point, quant_min, quant_max)
    return y


def fake_quantize_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    rounding: str = "reciprocal",
    check: bool = False,
) -> Tensor:
    """Fake-quantizes each slice of ``axis`` with its own scale and zero point.

    ``y[c] = (clamp(round(x[c] / scale[c]) + zero_point[c], quant_min, quant_max) − zero_point[c]) · scale[c]``

    Args:
        input: as in `fake_quantize_per_tensor_affine`.
        scale: float32 or bfloat16, 1-D, one element per slice; not checked.
        zero_point: the same number of int32, int64, float32 or float16. A floating one keeps its fraction, and with
            ``"reciprocal"`` is added before rounding. Integer ones must lie in the range: looked at on CPU.
        axis: counted from the front.
        rounding: as there. With ``"reciprocal"``, codes beyond int64 (+inf, 1e30) become ``quant_min``, as in torch.
        check: whether integer zero points are looked at in compiled code and on other devices too.

    Gradient: as there.

    Raises:
        RuntimeError: wrong dtypes, shapes or devices, a negative axis, an empty range or a zero point outside it; in
            torch's order, with torch's words.
        IndexError: no such axis.
        NotImplementedError: ``input`` is not floating.

    Source: ``torch.fake_quantize_per_channel_affine``, whose CPU kernels it equals bit for bit.

    >>> rows = torch.tensor([[0.24, 9.0], [0.24, 9.0]])
    >>> fake_quantize_per_channel_affine(rows, torch.tensor([0.1, 1.0]), torch.zeros(2, dtype=torch.int32), 0, -8, 7)
    tensor([[0.2000, 0.7000],
            [0.0000, 7.0000]])
    """
    y = PER_CHANNEL(input, scale, zero_point, axis, quant_min, quant_max, rounding=rounding)
    if check:
        assert_zero_points(zero_point, quant_min, quant_max)
    return y


def fake_quantize_differentiable(input: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """An older name of `fake_quantize_per_tensor_affine` with numbers, for code that still has it."""
    return fake_quantize_per_tensor_affine(input, scale, zero_point, qmin, qmax)
