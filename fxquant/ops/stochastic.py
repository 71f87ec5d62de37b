"""``fxquant::fake_quantize_stochastic`` and ``fxquant::uniform``: rounding up or down by chance, reproducibly.

The arithmetic is `fxquant.numerics.stochastic`: the number that an element draws follows from the seed and its
position alone, whatever the layout, the device or the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import per_channel_view, stochastic
from fxquant.ops.affine_checks import per_channel_arguments, per_tensor_arguments
from fxquant.ops.checks import scalar_type
from fxquant.ops.library import define


def as_seed(seed: int | Tensor, like: Tensor) -> Tensor:
    """A seed as operators take it: int64 ``[seed, offset]`` on the device of ``like``; a number has offset 0.

    A number is a constant of compiled code. For fresh noise in each step give a tensor, and add to its offset.
    """
    if isinstance(seed, Tensor):
        return seed
    if not -(2**63) <= seed < 2**63:
        raise InvalidArgument(f"`seed` must fit in a signed 64-bit integer: got {seed}. Take it modulo 2**63.")
    return torch.tensor([seed, 0], dtype=torch.int64, device=like.device)


def check_seed(seed: Tensor | None) -> None:
    """Dtype and shape of a seed that an operator got."""
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 1 or seed.shape[0] != 2):
        raise InvalidArgument(
            f"`seed` must be an int64 tensor of two elements, seed and offset: got {scalar_type(seed.dtype)} of shape "
            f"{tuple(seed.shape)}. Make it with torch.tensor([seed, 0])."
        )


def _ready(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, seed: Tensor, axis: int | None
) -> tuple[Tensor, Tensor]:
    """The arguments checked; scale and zero point as they broadcast against x."""
    check_seed(seed)
    if axis is None:
        per_tensor_arguments(x, scale, zero_point, quant_min, quant_max, "divide")
        return scale.reshape(()), zero_point.reshape(())
    per_channel_arguments(x, scale, zero_point, axis, quant_min, quant_max, "divide")
    return per_channel_view(scale, x.dim(), axis), per_channel_view(zero_point, x.dim(), axis)


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    seed: Tensor,
    *,
    axis: int | None = None,
) -> Tensor:
    scale, zero_point = _ready(x, scale, zero_point, quant_min, quant_max, seed, axis)
    return stochastic.fake_quantize_stochastic(x, scale, zero_point, quant_min, quant_max, seed)


def _backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    scale, zero_point = _ready(a.input, a.scale, a.zero_point, a.quant_min, a.quant_max, a.seed, a.axis)
    found = stochastic.fake_quantize_stochastic_backward(
        grad, a.input, scale, zero_point, a.quant_min, a.quant_max, a.seed
    )
    return {"input": found}


def _uniform(seed: Tensor, like: Tensor) -> Tensor:
    check_seed(seed)
    return stochastic.uniform(seed, like)


# No `lift`: a batch put in front would give each sample other numbers than a call of its own.
STOCHASTIC = define(
    "fake_quantize_stochastic(Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    "Tensor seed, *, int? axis=None) -> Tensor",
    _forward,
    backward=_backward,
)
UNIFORM = define("uniform(Tensor seed, Tensor like) -> Tensor", _uniform)


def fake_quantize_stochastic(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    quant_min: int,
    quant_max: int,
    seed: int | Tensor,
    *,
    axis: int | None = None,
) -> Tensor:
    """Fake-quantizes with stochastic rounding: within the range, the result is the input on average.

    code = floor(x / scale) + [u < x / scale − floor(x / scale)] + zero_point, with u uniform in [0, 1);
    y = (clamp(code, quant_min, quant_max) − zero_point) · scale. A multiple of the scale never moves. u is a multiple
    of 2^−24, so what lies less than that above a code can round up with probability 2^−24 only.

    Args:
        input: any floating dtype and shape; y has both. Arithmetic in float32, in float64 for float64.
        scale: a number, a tensor of one element, or a vector as long as ``axis``.
        zero_point: likewise.
        seed: a number, or an int64 tensor ``[seed, offset]``. The same seed gives the same result; see `as_seed`.
        axis: the channel axis, counted from the front.

    NaN becomes quant_min, ±inf the end of the range. Gradient: dy where the code of forward, before the clamp, lies in
    the range, 0 elsewhere; none to scale and zero_point.

    Raises:
        RuntimeError: as `fake_quantize_per_channel_affine` does.
        InvalidArgument: a seed of another dtype or shape.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015; random numbers: Philox-4x32-10.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=input.device)
    if not isinstance(zero_point, Tensor):
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=input.device)
    return STOCHASTIC(input, scale, zero_point, quant_min, quant_max, as_seed(seed, input), axis=axis)


def uniform(seed: int | Tensor, like: Tensor) -> Tensor:
    """The float32 numbers in [0, 1) that stochastic rounding of ``like`` draws: multiples of 2^−24, in its shape.

    Element i, in row-major order, has word 0 of Philox-4x32-10 with counter (i, offset) and key seed. No gradient.
    """
    return UNIFORM(as_seed(seed, like), like)
