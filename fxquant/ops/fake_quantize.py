"""``fxquant::fake_quantize_{per_tensor,per_channel}_affine``: quantize and dequantize in one op.

y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) − zero_point) · scale, with the gradient of the
clipped straight-through estimator: dx = dy where the code lies in the range, 0 elsewhere; none to scale and
zero_point. Equal to torch's CPU kernels bit for bit with ``rounding="reciprocal"`` (the default), and to ONNX
QuantizeLinear → DequantizeLinear with ``rounding="divide"``. The arithmetic is `fxquant.numerics`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant import numerics
from fxquant.ops.library import LIBRARY, define
from fxquant.spec import ROUNDINGS

_ZERO_POINTS = (torch.int32, torch.int64, torch.float32)


def _check_range(quant_min: int, quant_max: int, rounding: str) -> None:
    if quant_min > quant_max:
        raise RuntimeError(f"`quant_min` should be less than or equal to `quant_max`: got {quant_min} and {quant_max}.")
    if rounding not in ROUNDINGS:
        raise RuntimeError(f"`rounding` must be one of {ROUNDINGS}: got {rounding!r}.")


def _check_qparams(scale: Tensor, zero_point: Tensor) -> None:
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"Scale must be Float or BFloat16, found {scale.dtype}.")
    if zero_point.dtype not in _ZERO_POINTS:
        raise RuntimeError(f"Zero-point must be Int32, Int64 or Float, found {zero_point.dtype}.")


def _check_tensor_qparams(scale: Tensor, zero_point: Tensor) -> None:
    _check_qparams(scale, zero_point)
    if scale.numel() != 1 or zero_point.numel() != 1:
        raise RuntimeError(
            "per-tensor scale and zero_point must hold one element each: "
            f"got shapes {tuple(scale.shape)} and {tuple(zero_point.shape)}."
        )


def _check_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> None:
    _check_qparams(scale, zero_point)
    if scale.dim() != 1 or zero_point.dim() != 1:
        raise RuntimeError("scale and zero-point need to be 1-D tensors.")
    if not 0 <= axis < x.dim():
        raise RuntimeError(f"`axis` must be between 0 and number of dimensions of input: got {axis} of {x.dim()}.")
    if scale.shape[0] != x.shape[axis] or zero_point.shape[0] != x.shape[axis]:
        raise RuntimeError(
            "dimensions of scale and zero-point are not consistent with input tensor: "
            f"got {scale.shape[0]} and {zero_point.shape[0]} for {x.shape[axis]} slices of axis {axis}."
        )


def _per_tensor_scalar(x, scale, zero_point, quant_min, quant_max, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    _check_range(quant_min, quant_max, rounding)
    if not quant_min <= zero_point <= quant_max:
        raise RuntimeError(
            f"`zero_point` must be between `quant_min` and `quant_max`: got {zero_point}, not in "
            f"[{quant_min}, {quant_max}]."
        )
    scale_tensor = torch.full((), scale, dtype=torch.float32, device=x.device)
    point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
    return numerics.fake_quantize_per_tensor(x, scale_tensor, point, quant_min, quant_max, rounding)


def _per_tensor(x, scale, zero_point, quant_min, quant_max, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    _check_range(quant_min, quant_max, rounding)
    _check_tensor_qparams(scale, zero_point)
    scale, point = scale.reshape(()), zero_point.reshape(())
    return numerics.fake_quantize_per_tensor(x, scale, point, quant_min, quant_max, rounding)


def _per_channel(x, scale, zero_point, axis, quant_min, quant_max, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    _check_range(quant_min, quant_max, rounding)
    _check_channels(x, scale, zero_point, axis)
    return numerics.fake_quantize_per_channel(x, scale, zero_point, axis, quant_min, quant_max, rounding)


def _per_tensor_grad(grad, x, scale, zero_point, quant_min, quant_max, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    scale, point = scale.reshape(()), zero_point.reshape(())
    return numerics.fake_quantize_per_tensor_backward(grad, x, scale, point, quant_min, quant_max, rounding)


def _per_channel_grad(grad, x, scale, zero_point, axis, quant_min, quant_max, *, rounding="reciprocal"):  # type: ignore[no-untyped-def]
    return numerics.fake_quantize_per_channel_backward(grad, x, scale, zero_point, axis, quant_min, quant_max, rounding)


_TENSOR = "Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_CHANNEL = "Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max"
_ROUNDING = '*, str rounding="reciprocal"'

PER_TENSOR_SCALAR = define(
    "fake_quantize_per_tensor_affine(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
    f"{_ROUNDING}) -> Tensor",
    _per_tensor_scalar,
)
PER_TENSOR = define(
    f"fake_quantize_per_tensor_affine.tensor_qparams(Tensor input, {_TENSOR}, {_ROUNDING}) -> Tensor", _per_tensor
)
PER_CHANNEL = define(f"fake_quantize_per_channel_affine(Tensor input, {_CHANNEL}, {_ROUNDING}) -> Tensor", _per_channel)
PER_TENSOR_BACKWARD = define(
    f"fake_quantize_per_tensor_affine_backward(Tensor grad, Tensor input, {_TENSOR}, {_ROUNDING}) -> Tensor",
    _per_tensor_grad,
)
PER_CHANNEL_BACKWARD = define(
    f"fake_quantize_per_channel_affine_backward(Tensor grad, Tensor input, {_CHANNEL}, {_ROUNDING}) -> Tensor",
    _per_channel_grad,
)

FAKE_QUANTIZE = (PER_TENSOR_SCALAR, PER_TENSOR, PER_CHANNEL)
BACKWARD = (PER_TENSOR_BACKWARD, PER_CHANNEL_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.static = tuple(a for a in inputs if not isinstance(a, Tensor))
    ctx.rounding = keyword_only_inputs["rounding"]


def _backward_scalar(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    scale, zero_point, quant_min, quant_max = ctx.static
    scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    zero_point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
    grad = PER_TENSOR_BACKWARD(grad, x, scale, zero_point, quant_min, quant_max, rounding=ctx.rounding)
    return grad, None, None, None, None


def _backward_with(op: Any, count: int) -> Any:
    """Gradient of a forward op with ``count`` arguments, by its backward op; saved are x, scale, zero_point."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (op(grad, *ctx.saved_tensors, *ctx.static, rounding=ctx.rounding), *(None,) * (count - 1))

    return backward


def _double_backward_with(op: Any, count: int) -> Any:
    """The backward op is linear in its gradient, so its own gradient is itself, applied to the new one."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *saved = ctx.saved_tensors
        return (op(grad, *saved, *ctx.static, rounding=ctx.rounding), *(None,) * (count - 1))

    return backward


for _name, _backward in (
    ("fake_quantize_per_tensor_affine", _backward_scalar),
    ("fake_quantize_per_tensor_affine.tensor_qparams", _backward_with(PER_TENSOR_BACKWARD, 5)),
    ("fake_quantize_per_channel_affine", _backward_with(PER_CHANNEL_BACKWARD, 6)),
    ("fake_quantize_per_tensor_affine_backward", _double_backward_with(PER_TENSOR_BACKWARD, 6)),
    ("fake_quantize_per_channel_affine_backward", _double_backward_with(PER_CHANNEL_BACKWARD, 7)),
):
    torch.library.register_autograd(f"fxquant::{_name}", _backward, setup_context=_save, lib=LIBRARY)


def fake_quantize_per_tensor_affine(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    *,
    rounding: str = "reciprocal",
) -> Tensor:
    """Fake-quantizes with one scale and zero point, as numbers or as one-element tensors.

    Shapes and dtype of the result are the input's (any floating dtype). Raises RuntimeError with torch's words
    for an empty range or a zero point outside it.

    >>> fake_quantize_per_tensor_affine(torch.tensor([0.24, 9.0]), 0.1, 0, -128, 127, rounding="divide")
    tensor([0.2000, 9.0000])
    """
    if isinstance(scale, Tensor) != isinstance(zero_point, Tensor):
        raise RuntimeError("scale and zero_point must both be numbers or both be tensors.")
    op = PER_TENSOR if isinstance(scale, Tensor) else PER_TENSOR_SCALAR
    return op(input, scale, zero_point, quant_min, quant_max, rounding=rounding)


def fake_quantize_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    rounding: str = "reciprocal",
) -> Tensor:
    """Fake-quantizes each slice of ``axis`` with its own scale and zero point (1-D tensors of that length)."""
    return PER_CHANNEL(input, scale, zero_point, axis, quant_min, quant_max, rounding=rounding)
