"""Fake quantization with parameters that receive gradients: torch's learnable affine op, LSQ and LSQ+, PACT, TQT.

Every op rounds half to even and decides by one rounded code what is clamped, forward and backward. NaN has the value
and the gradients of ``quant_min``; scale 0, negative or NaN follows IEEE arithmetic, as in torch. The sums for the
parameters are float32 (float64 for float64 input), so their last bits depend on the order that a device adds in.
The arithmetic is `fxquant.numerics.learnable`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import learnable
from fxquant.numerics.division import Rounding
from fxquant.ops.checks import check_floating, check_range, check_rounding, scalar_type
from fxquant.ops.library import define, same_arguments

# Codes of more bits are not exact in float32.
_MAX_BITS = 24


def _check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    if not parameter.is_floating_point():
        raise RuntimeError(
            f"`{name}` must be a floating-point tensor, as it receives a gradient: "
            f"got {scalar_type(parameter.dtype)}. Use {name}.float()."
        )
    if parameter.dtype not in (torch.float32, x.dtype):
        allowed = " or ".join(dict.fromkeys(("Float", scalar_type(x.dtype))))
        raise RuntimeError(
            f"`{name}` must be {allowed} for an input of {scalar_type(x.dtype)}: "
            f"got {scalar_type(parameter.dtype)}. Use {name}.float()."
        )
    if parameter.device != x.device:
        raise RuntimeError(
            f"`{name}` must be on the input's device: got {parameter.device} and {x.device}. "
            f"Use {name}.to(input.device)."
        )


def _check_parameters(x: Tensor, axis: int | None, parameters: dict[str, Tensor]) -> None:
    """Each has one element, or one for each slice of ``axis``; all have one dtype."""
    check_floating("input", x)
    if axis is not None and not 0 <= axis < x.dim():
        raise RuntimeError(f"`axis` must be between 0 and the number of dimensions of input: got {axis} of {x.dim()}.")
    first = next(iter(parameters))
    for name, parameter in parameters.items():
        _check_parameter(name, parameter, x)
        if parameter.dtype != parameters[first].dtype:
            found = f"{scalar_type(parameter.dtype)} and {scalar_type(parameters[first].dtype)}"
            raise RuntimeError(f"`{name}` must have the dtype of `{first}`: got {found}. Use {name}.to({first}.dtype).")
        if axis is None and parameter.numel() != 1:
            raise RuntimeError(f"`{name}` must be a 1-element tensor: got shape {tuple(parameter.shape)}.")
        if axis is not None and parameter.dim() != 1:
            raise RuntimeError(f"`{name}` must be a 1-D tensor: got shape {tuple(parameter.shape)}.")
        if axis is not None and parameter.shape[0] != x.shape[axis]:
            raise RuntimeError(
                f"`{name}` must have one element for each of the {x.shape[axis]} slices of axis {axis}: "
                f"got {parameter.shape[0]}."
            )


def _check_bits(num_bits: int, signed: bool) -> None:
    least = 2 if signed else 1
    if not least <= num_bits <= _MAX_BITS:
        raise RuntimeError(f"`num_bits` must be between {least} and {_MAX_BITS} with signed={signed}: got {num_bits}.")


def _affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    check_rounding(rounding)
    check_range(quant_min, quant_max)
    _check_parameters(x, axis, {"scale": scale, "zero_point": zero_point})
    return learnable.learnable_affine(x, scale, zero_point, axis, quant_min, quant_max, rounding)


def _per_tensor(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    rounding: Rounding = "reciprocal",
) -> Tensor:
    return _affine(x, scale, zero_point, None, quant_min, quant_max, rounding)


def _per_channel(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    rounding: Rounding = "reciprocal",
) -> Tensor:
    return _affine(x, scale, zero_point, axis, quant_min, quant_max, rounding)


def _affine_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    axis = getattr(a, "axis", None)
    found = learnable.learnable_affine_backward(
        grad, a.input, a.scale, a.zero_point, axis, a.quant_min, a.quant_max, a.grad_factor, a.rounding
    )
    return dict(zip(("input", "scale", "zero_point"), found, strict=True))


def _lsq_plus(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    check_range(quant_min, quant_max)
    _check_parameters(x, axis, {"scale": scale, "offset": offset})
    return learnable.lsq_plus(x, scale, offset, axis, quant_min, quant_max)


def _lsq_plus_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    found = learnable.lsq_plus_backward(
        grad, a.input, a.scale, a.offset, a.axis, a.quant_min, a.quant_max, a.grad_factor
    )
    return dict(zip(("input", "scale", "offset"), found, strict=True))


def _lift_lsq_plus(
    x: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> tuple[Any, ...]:
    return x, scale, offset, quant_min, quant_max, None if axis is None else axis + 1


def _pact(x: Tensor, alpha: Tensor, *, num_bits: int = 8, signed: bool = False) -> Tensor:
    _check_bits(num_bits, signed)
    _check_parameters(x, None, {"alpha": alpha})
    return learnable.pact(x, alpha, num_bits, signed)


def _pact_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    found = learnable.pact_backward(grad, a.input, a.alpha, a.signed)
    return dict(zip(("input", "alpha"), found, strict=True))


def _tqt(x: Tensor, log2_threshold: Tensor, *, num_bits: int = 8, signed: bool = True) -> Tensor:
    _check_bits(num_bits, signed)
    _check_parameters(x, None, {"log2_threshold": log2_threshold})
    return learnable.tqt(x, log2_threshold, num_bits, signed)


def _tqt_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    found = learnable.tqt_backward(grad, a.input, a.log2_threshold, a.num_bits, a.signed)
    return dict(zip(("input", "log2_threshold"), found, strict=True))


LEARNABLE_PER_TENSOR = define(
    "fake_quantize_learnable_per_tensor_affine(Tensor input, Tensor scale, Tensor zero_point, int quant_min, "
    'int quant_max, float grad_factor=1., *, str rounding="reciprocal") -> Tensor',
    _per_tensor,
    backward=_affine_backward,
    lift=same_arguments,
)
LEARNABLE_PER_CHANNEL = define(
    "fake_quantize_learnable_per_channel_affine(Tensor input, Tensor scale, Tensor zero_point, int axis, "
    'int quant_min, int quant_max, float grad_factor=1., *, str rounding="reciprocal") -> Tensor',
    _per_channel,
    backward=_affine_backward,
    lift=lambda x, scale, point, axis, *rest: (x, scale, point, axis + 1, *rest),
)
LSQ_PLUS = define(
    "fake_quantize_lsq_plus(Tensor input, Tensor scale, Tensor offset, int quant_min, int quant_max, int? axis=None, "
    "*, float grad_factor=1.) -> Tensor",
    _lsq_plus,
    backward=_lsq_plus_backward,
    lift=_lift_lsq_plus,
)
PACT = define(
    "fake_quantize_pact(Tensor input, Tensor alpha, *, int num_bits=8, bool signed=False) -> Tensor",
    _pact,
    backward=_pact_backward,
    lift=same_arguments,
)
TQT = define(
    "fake_quantize_tqt(Tensor input, Tensor log2_threshold, *, int num_bits=8, bool signed=True) -> Tensor",
    _tqt,
    backward=_tqt_backward,
    lift=same_arguments,
)


def fake_quantize_learnable_per_tensor_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    rounding: str = "reciprocal",
) -> Tensor:
    """Fake-quantizes with one scale and zero point that are trained.

    ``y = (clamp(round(x / scale) + z, quant_min, quant_max) − z) · scale`` with
    ``z = clamp(round(zero_point), quant_min, quant_max)``. Gradients, summed over the elements::

        input       dy inside the range, 0 where clamped
        scale       dy · (quant_min − z below, quant_max − z above, (y − x) / scale inside) · grad_factor
        zero_point  dy · (−scale where clamped, 0 inside) · grad_factor

    Args:
        input: any floating dtype; the result has its shape and dtype.
        scale: one element, float32 or the input's dtype.
        zero_point: one element, of ``scale``'s dtype. NaN counts as ``quant_min``.
        grad_factor: scales the gradients of both parameters; see `lsq_grad_factor`.
        rounding: ``"reciprocal"`` multiplies by 1/scale as torch does, ``"divide"`` divides as ONNX does.

    Equals torch._fake_quantize_learnable_per_tensor_affine bit for bit on float32. torch's backward differs
    from its forward, this one does not: at ties torch clamps otherwise, as it rounds after adding the zero point; it
    takes −3 for a zero point of −4, and counts what int64 cannot hold as below.

    Raises RuntimeError for other dtypes, shapes or devices and for an empty range. Equations: Esser et al., LSQ, 2020.
    """
    return LEARNABLE_PER_TENSOR(input, scale, zero_point, quant_min, quant_max, grad_factor, rounding=rounding)


def fake_quantize_learnable_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    rounding: str = "reciprocal",
) -> Tensor:
    """`fake_quantize_learnable_per_tensor_affine` with one scale and zero point for each slice of ``axis``.

    Both are 1-D tensors of that length, and so are their gradients. As in torch's per-channel ops, codes that int64
    cannot hold, and infinity, count as below with ``rounding="reciprocal"``.
    """
    return LEARNABLE_PER_CHANNEL(input, scale, zero_point, axis, quant_min, quant_max, grad_factor, rounding=rounding)


def lsq_grad_factor(numel: int, quant_max: int) -> float:
    """``1 / sqrt(numel · quant_max)``, the gradient scale of LSQ (Esser et al., 2020).

    ``numel`` is the number of elements that share a scale: of a weight, or of an activation without its batch.

    >>> lsq_grad_factor(100, 4)
    0.05
    """
    for name, value in (("numel", numel), ("quant_max", quant_max)):
        if value <= 0:
            raise InvalidArgument(f"`{name}` must be positive: got {value}.")
    return 1.0 / math.sqrt(numel * quant_max)


def fake_quantize_lsq_plus(
    input: Tensor,
    scale: Tensor,
    offset: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    axis: int | None = None,
) -> Tensor:
    """Fake-quantizes with a trained scale and a trained offset, which is a real number and not a code.

    ``y = clamp(round((x − offset) / scale), quant_min, quant_max) · scale + offset``. Gradients, summed::

        input   dy inside the range, 0 where clamped
        scale   dy · (quant_min below, quant_max above, round(u) − u inside) · grad_factor, u = (x − offset) / scale
        offset  dy where clamped · grad_factor

    Args:
        input: any floating dtype; the result has its shape and dtype.
        scale: one element, or 1-D with one for each slice of ``axis``; float32 or the input's dtype.
        offset: of ``scale``'s shape and dtype.

    Zero has no code of its own unless ``offset / scale`` is an integer. Raises RuntimeError for other dtypes, shapes
    or devices and for an empty range. Source: Bhalgat et al., LSQ+, 2020.
    """
    return LSQ_PLUS(input, scale, offset, quant_min, quant_max, axis, grad_factor=grad_factor)


def fake_quantize_pact(input: Tensor, alpha: Tensor, num_bits: int = 8, signed: bool = False) -> Tensor:
    """Clips to a trained ``alpha`` and fake-quantizes what is left.

    ``y = round(clamp(x, 0, alpha) / s) · s`` with ``s = alpha / (2^num_bits − 1)``; signed, from −alpha on and with
    ``s = alpha / (2^(num_bits − 1) − 1)``. Gradients: dy to ``input`` where ``0 ≤ x < alpha`` (signed:
    ``|x| < alpha``), and to ``alpha`` the sum of dy where ``x ≥ alpha`` less, signed, that where ``x ≤ −alpha``.

    ``input`` has any floating dtype, the result its shape and dtype; ``alpha`` one element, float32 or the input's
    dtype, and is to be positive. NaN counts as the lower end. Raises RuntimeError for other dtypes, shapes or devices,
    and for ``num_bits`` outside 1…24 (signed: 2…24). Source: Choi et al., PACT, 2018.
    """
    return PACT(input, alpha, num_bits=num_bits, signed=signed)


def fake_quantize_tqt(input: Tensor, log2_threshold: Tensor, num_bits: int = 8, signed: bool = True) -> Tensor:
    """Fake-quantizes with a power-of-two scale whose threshold is trained by its logarithm.

    ``y = clamp(round(x / s), quant_min, quant_max) · s`` with ``s = 2^ceil(log2_threshold) / 2^(num_bits − 1)`` and
    all codes of ``num_bits``; unsigned, ``/ 2^num_bits``. s is exact, and kept to normal numbers of the arithmetic's
    dtype. Gradients: dy to ``input`` inside the range; to ``log2_threshold``
    ``s · ln 2 · Σ dy · (quant_min below, quant_max above, round(x / s) − x / s inside)``.

    ``input`` has any floating dtype, the result its shape and dtype; ``log2_threshold`` one element, float32 or the
    input's dtype; if it is NaN, so is y. Raises RuntimeError for other dtypes, shapes or devices, and for
    ``num_bits`` outside 1…24 (signed: 2…24). Source: Jain et al., TQT, 2020.
    """
    return TQT(input, log2_threshold, num_bits=num_bits, signed=signed)


LEARNABLE = (LEARNABLE_PER_TENSOR, LEARNABLE_PER_CHANNEL, LSQ_PLUS, PACT, TQT)
