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
from fxquant.numerics import elements, learnable, per_channel_view
from fxquant.numerics.division import Rounding
from fxquant.numerics.formats import float_format
from fxquant.ops.affine_checks import (
    ZERO_POINT_RANGE,
    check_channel_zero_points,
    per_channel_arguments,
    per_tensor_arguments,
    scalar_arguments,
)
from fxquant.ops.checks import assert_values
from fxquant.ops.library import define, same_arguments


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
    element: str | None = None,
    error_gradient: bool = True,
) -> Tensor:
    per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, rounding)
    scale, point = scale.reshape(()), zero_point.reshape(())
    if element is not None:
        return elements.fake_quantize(x, scale, float_format(element), rounding)
    return numerics.fake_quantize_per_tensor(x, scale, point, quant_min, quant_max, rounding)


# Fakes of a graph with open sizes are asked for at every node and every retrace: one operation, not a dozen.
def _per_tensor_scalar_fake(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, *, rounding: Rounding = "reciprocal"
) -> Tensor:
    scalar_arguments(x, zero_point, quant_min, quant_max, rounding)
    return x.neg()


def _per_tensor_fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
    **_: Any,
) -> Tensor:
    per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, rounding)
    return x.neg()


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
    element: str | None = None,
    error_gradient: bool = True,
) -> Tensor:
    per_channel_arguments(x, scale, zero_point, axis, quant_min, quant_max, rounding)
    if element is not None:
        return elements.fake_quantize(x, per_channel_view(scale, x.dim(), axis), float_format(element), rounding)
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
    element: str | None = None,
) -> Tensor:
    scale, point = scale.reshape(()), zero_point.reshape(())
    if element is not None:
        return grad * elements.clip_mask(x, scale, float_format(element), rounding).to(grad.dtype)
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
    element: str | None = None,
) -> Tensor:
    if element is not None:
        step = per_channel_view(scale, x.dim(), axis)
        return grad * elements.clip_mask(x, step, float_format(element), rounding).to(grad.dtype)
    return numerics.fake_quantize_per_channel_backward(grad, x, scale, zero_point, axis, quant_min, quant_max, rounding)


# The backward ops are linear in `grad`, so their own gradient is themselves, applied to the new one.
def _backward_per_tensor(a: Any, grad: Tensor) -> dict[str, Tensor]:
    if getattr(a, "pass_through", False):
        return {"input": grad}
    limits, form = (a.quant_min, a.quant_max), {"rounding": a.rounding, "element": getattr(a, "element", None)}
    found = PER_TENSOR_BACKWARD(grad, a.input, a.scale, a.zero_point, *limits, **form)
    return {"input": found, **_to_scale(a, grad, None)}


def _to_scale(a: Any, grad: Tensor, axis: int | None) -> dict[str, Tensor]:
    """The gradient of the scale where it is asked for: LSQ's (Esser et al., 2020), times the factor given.

    A zero point that is floating is trained too, and has the same factor.
    """
    factor = getattr(a, "scale_gradient", 0.0)
    if not factor:
        return {}
    if a.element is not None:
        format = float_format(a.element)
        return {"scale": elements.scale_gradient(grad, a.input, a.scale, axis, format, a.rounding) * factor}
    point = a.zero_point.to(a.scale.dtype)
    limits = (a.quant_min, a.quant_max)
    _, scale, zero_point = learnable.learnable_affine_backward(
        grad, a.input, a.scale, point, axis, *limits, factor, a.rounding, a.error_gradient
    )
    return {"scale": scale, **({"zero_point": zero_point} if a.zero_point.is_floating_point() else {})}


def _backward_scalar(a: Any, grad: Tensor) -> dict[str, Tensor]:
    a.scale = scale_tensor(a.scale, a.input.device)
    a.zero_point = torch.full((), a.zero_point, dtype=torch.int32, device=a.input.device)
    return _backward_per_tensor(a, grad)


def _backward_per_channel(a: Any, grad: Tensor) -> dict[str, Tensor]:
    if getattr(a, "pass_through", False):
        return {"input": grad}
    limits, form = (a.quant_min, a.quant_max), {"rounding": a.rounding, "element": a.element}
    found = PER_CHANNEL_BACKWARD(grad, a.input, a.scale, a.zero_point, a.axis, *limits, **form)
    return {"input": found, **_to_scale(a, grad, a.axis)}


_TENSOR = "Tensor scale, Tensor zero_point, int quant_min, int quant_max"


_CHANNEL = "Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max"


_ROUNDING = '*, str rounding="reciprocal"'


# pass_through: the caller knows that no code lies outside the range, so the gradient is dy, and nothing is kept for it.
# scale_gradient: for scales that are trained, the factor of the gradient that they receive; 0 for none, as in torch.
# element: codes are those of a small float format, whose ends are quant_min and quant_max; the zero point is 0. See
# ``fxquant.numerics.elements``.
# error_gradient: whether rounding errors inside the range are part of it (LSQ), or only what is clipped (PACT).
_FORWARD = f"{_ROUNDING}, bool pass_through=False, float scale_gradient=0., str? element=None, bool error_gradient=True"
_ELEMENT = f"{_ROUNDING}, str? element=None"


_SAVED = ("input", "scale", "zero_point")


PER_TENSOR_SCALAR = define(
    "fake_quantize_per_tensor_affine(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
    f"{_ROUNDING}) -> Tensor",
    _per_tensor_scalar,
    fake=_per_tensor_scalar_fake,
    backward=_backward_scalar,
    lift=same_arguments,
)


PER_TENSOR = define(
    f"fake_quantize_per_tensor_affine.tensor_qparams(Tensor input, {_TENSOR}, {_FORWARD}) -> Tensor",
    _per_tensor,
    fake=_per_tensor_fake,
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
    f"fake_quantize_per_tensor_affine_backward(Tensor grad, Tensor input, {_TENSOR}, {_ELEMENT}) -> Tensor",
    _per_tensor_grad,
    backward=lambda a, grad: {"grad": _backward_per_tensor(a, grad)["input"]},
    saves=_SAVED,
)


PER_CHANNEL_BACKWARD = define(
    f"fake_quantize_per_channel_affine_backward(Tensor grad, Tensor input, {_CHANNEL}, {_ELEMENT}) -> Tensor",
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
        assert_values(inside, f"{ZERO_POINT_RANGE}: got one outside [{quant_min}, {quant_max}].")


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
