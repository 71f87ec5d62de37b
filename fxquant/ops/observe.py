"""torch.fused_moving_avg_obs_fake_quant, as two functional ops and a function that stores the state.

`moving_avg_qparams` takes the range of a batch into its moving average and chooses scale and zero point, without a
gradient; `switched_fake_quantize` fake-quantizes where a tensor says so, with the clipped straight-through estimator.
They are two because autograd keeps what a backward reads: scale and zero point as chosen, which are outputs of the
first op, and never the state, which is written to before the backward runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxquant.numerics import observe
from fxquant.numerics.division import Rounding
from fxquant.ops.checks import check_floating, check_range, check_rounding, scalar_type
from fxquant.ops.library import define

_ZERO_POINTS = (torch.int32, torch.int64)


class Observed(NamedTuple):
    """The fake-quantized input and the next state."""

    output: Tensor
    running_min: Tensor
    running_max: Tensor
    scale: Tensor
    zero_point: Tensor


def _check_state(x: Tensor, axis: int | None, tensors: dict[str, Tensor]) -> None:
    """Each tensor has one element, or one for each slice of ``axis``, and its dtype."""
    for name, tensor in tensors.items():
        if name == "zero_point":
            if tensor.dtype not in _ZERO_POINTS:
                raise RuntimeError(f"`zero_point` must be Int or Long: got {scalar_type(tensor.dtype)}.")
        elif tensor.dtype != torch.float32:
            raise RuntimeError(f"`{name}` must be Float: got {scalar_type(tensor.dtype)}. Use {name}.float().")
        if axis is None and tensor.numel() != 1:
            raise RuntimeError(f"`{name}` must be a 1-element tensor: got shape {tuple(tensor.shape)}.")
        if axis is not None and tensor.dim() != 1:
            raise RuntimeError(f"`{name}` must be a 1-D tensor: got shape {tuple(tensor.shape)}.")
        if axis is not None and tensor.shape[0] != x.shape[axis]:
            raise RuntimeError(
                f"`{name}` must have one element for each of the {x.shape[axis]} slices of axis {axis}: "
                f"got {tensor.shape[0]}. A range starts with infinities, torch.full(({x.shape[axis]},), torch.inf)."
            )


def _check_axis(name: str, x: Tensor, axis: int | None) -> None:
    if axis is not None and not 0 <= axis < x.dim():
        raise RuntimeError(
            f"`{name}` must be between 0 and the number of dimensions of input: got {axis} of {x.dim()}."
        )


def _check_codes(quant_min: int, quant_max: int, symmetric: bool) -> None:
    check_range(quant_min, quant_max)
    if not -(2**31) <= quant_min <= quant_max < 2**31:
        raise RuntimeError(f"`quant_min` and `quant_max` must fit in int32: got {quant_min} and {quant_max}.")
    least = 2 if symmetric else 1
    if quant_max - quant_min < least:
        raise RuntimeError(
            f"`quant_max` must be at least quant_min + {least}{' with symmetric_quant' if symmetric else ''}, "
            f"or no scale exists: got {quant_min} and {quant_max}."
        )


def _qparams(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    point: Tensor,
    constant: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
    delayed: bool = False,
) -> tuple[Tensor, ...]:
    axis = ch_axis if per_row_fake_quant else None
    check_floating("input", x)
    _check_codes(quant_min, quant_max, symmetric_quant)
    _check_axis("ch_axis", x, axis)
    for name, switch in (("observer_on", observer_on), ("fake_quant_on", fake_quant_on)):
        if switch.numel() != 1:
            raise RuntimeError(f"`{name}` must be a 1-element tensor: got shape {tuple(switch.shape)}.")
    _check_state(x, axis, {"running_min": low, "running_max": high, "scale": scale, "zero_point": point})
    state, used_scale, used_point = observe.observe(
        x,
        observer_on,
        fake_quant_on,
        observe.State(low, high, scale, point),
        constant,
        quant_min,
        quant_max,
        axis,
        symmetric_quant,
        delayed,
    )
    return (*state, used_scale, used_point)


def _switched(
    x: Tensor,
    on: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    *,
    rounding: Rounding = "reciprocal",
) -> Tensor:
    check_rounding(rounding)
    check_floating("input", x)
    check_range(quant_min, quant_max)
    _check_axis("axis", x, axis)
    if on.dtype != torch.bool or on.numel() != 1:
        raise RuntimeError(f"`on` must be a 1-element Bool tensor: got {scalar_type(on.dtype)} {tuple(on.shape)}.")
    _check_state(x, axis, {"scale": scale, "zero_point": zero_point})
    return observe.switched_fake_quantize(x, on.reshape(()), scale, zero_point, axis, quant_min, quant_max, rounding)


def _switched_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return {
        "input": observe.switched_fake_quantize_backward(
            grad, a.input, a.on.reshape(()), a.scale, a.zero_point, a.axis, a.quant_min, a.quant_max, a.rounding
        )
    }


MOVING_AVG_QPARAMS = define(
    "moving_avg_qparams(Tensor input, Tensor observer_on, Tensor fake_quant_on, Tensor running_min, "
    "Tensor running_max, Tensor scale, Tensor zero_point, float averaging_const, int quant_min, int quant_max, "
    "int ch_axis, bool per_row_fake_quant=False, bool symmetric_quant=False, bool delayed=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _qparams,
)
SWITCHED_FAKE_QUANTIZE = define(
    "switched_fake_quantize(Tensor input, Tensor on, Tensor scale, Tensor zero_point, int? axis, int quant_min, "
    'int quant_max, *, str rounding="reciprocal") -> Tensor',
    _switched,
    backward=_switched_backward,
    lift=lambda x, on, scale, point, axis, *rest: (x, on, scale, point, None if axis is None else axis + 1, *rest),
)


def moving_avg_obs_fake_quant(
    input: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
    *,
    delayed: bool = False,
    rounding: str = "reciprocal",
) -> Observed:
    """`fused_moving_avg_obs_fake_quant` that returns the next state and leaves the given one as it is."""
    *state, used_scale, used_point = MOVING_AVG_QPARAMS(
        input.detach(),
        observer_on,
        fake_quant_on,
        running_min,
        running_max,
        scale,
        zero_point,
        averaging_const,
        quant_min,
        quant_max,
        ch_axis,
        per_row_fake_quant,
        symmetric_quant,
        delayed,
    )
    # A tensor of its own: the switch may be turned before the backward runs.
    on = fake_quant_on != 0
    axis = ch_axis if per_row_fake_quant else None
    output = SWITCHED_FAKE_QUANTIZE(input, on, used_scale, used_point, axis, quant_min, quant_max, rounding=rounding)
    return Observed(output, *state)


def fused_moving_avg_obs_fake_quant(
    input: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
    *,
    delayed: bool = False,
    rounding: str = "reciprocal",
) -> Tensor:
    """Observes the input's range, chooses scale and zero point, and fake-quantizes: one training step of a quantizer.

    ``r ← r + averaging_const · (batch − r)`` for minimum and maximum, where an infinite ``r`` is unset and takes the
    batch's value; scale and zero point of that range, widened to hold 0; then ``fake_quantize_per_tensor_affine``,
    or ``fake_quantize_per_channel_affine`` over ``ch_axis`` with ``per_row_fake_quant``. Output, gradient and the four
    state tensors, which are written in place, are those of torch's CPU op bit for bit.

    Args:
        input: any floating dtype (torch: float32); the range is float32. If empty, nothing changes.
        observer_on: one element; 0 leaves the range as it is. Not read on the host.
        fake_quant_on: one element; 0 leaves scale and zero point as they are, and returns the input's values.
        running_min: float32 of one element, or 1-D with one for each slice of ``ch_axis``.
        running_max: likewise.
        scale: likewise.
        zero_point: int32 or int64, of that shape.
        averaging_const: the weight of the batch.
        quant_min: the least code.
        quant_max: the largest; at least two codes in all, three with ``symmetric_quant``.
        ch_axis: any axis (torch: 0); ignored without ``per_row_fake_quant``.
        symmetric_quant: a range on both sides of 0 is widened to mirror, its zero point is the middle code.
        delayed: quantize with the scale of the range at entry, so that the output does not wait for the batch's
            range; the first step, which has none, uses the batch's own. The state goes on as it does without.
        rounding: ``"reciprocal"`` is torch's, ``"divide"`` ONNX QuantizeLinear's.

    The gradient to ``input`` is ``grad`` where the code lies in the range, 0 elsewhere and for NaN; all of it where
    ``fake_quant_on`` is 0. A batch, or slice, with NaN or an infinity leaves its range as it was, and is quantized
    with it (torch keeps a NaN for ever). With a range still unset, scale is 0.1 as in torch.

    Raises RuntimeError for shapes, dtypes and ranges other than these. From torch's operator of the same name.
    """
    output, *state = moving_avg_obs_fake_quant(
        input,
        observer_on,
        fake_quant_on,
        running_min,
        running_max,
        scale,
        zero_point,
        averaging_const,
        quant_min,
        quant_max,
        ch_axis,
        per_row_fake_quant,
        symmetric_quant,
        delayed=delayed,
        rounding=rounding,
    )
    for old, new in zip((running_min, running_max, scale, zero_point), state, strict=True):
        old.copy_(new)
    return output


__all__ = [
    "MOVING_AVG_QPARAMS",
    "SWITCHED_FAKE_QUANTIZE",
    "Observed",
    "fused_moving_avg_obs_fake_quant",
    "moving_avg_obs_fake_quant",
]
