"""``fxquant::fake_quantize_float`` and the pair ``quantize_float``, ``dequantize_float``: 8 bits and fewer, floating.

y = round(x / scale) · scale, rounded half to even on the grid of a format of `fxquant.formats`. The arithmetic is
`fxquant.numerics.floating`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import floating, per_channel_view
from fxquant.numerics.formats import FloatFormat, float_format
from fxquant.ops.checks import check_floating, scalar_type
from fxquant.ops.library import define
from fxquant.ops.stochastic import as_seed, check_seed

FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_RESULTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_format(format: str, saturate: bool) -> FloatFormat:
    found = float_format(format)
    if not saturate and not found.overflows:
        raise InvalidArgument(
            f"`saturate` must be True for {found}, which has neither infinity nor NaN: got False. "
            "Use e4m3 or e5m2 to see what overflows."
        )
    return found


def _check_float8(dtype: torch.dtype, name: str) -> str:
    if dtype not in FLOAT8:
        known = " or ".join(map(str, FLOAT8))
        raise InvalidArgument(f"`{name}` must be {known}: got {dtype}. Other formats have no tensor of their own.")
    return FLOAT8[dtype]


def _ready(x: Tensor, scale: Tensor | None) -> Tensor | None:
    """The scale checked, as it broadcasts against x without changing x's shape."""
    if scale is None:
        return None
    check_floating("scale", scale)
    if scale.numel() == 1:
        return scale.reshape(())
    fits = scale.dim() <= x.dim() and all(
        found in (1, wanted) for found, wanted in zip(reversed(scale.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise InvalidArgument(
            f"`scale` must broadcast to the shape of the input, {tuple(x.shape)}: got shape {tuple(scale.shape)}. "
            "For one scale per channel give a vector and `axis`."
        )
    return scale


def _fake_quantize(
    x: Tensor, scale: Tensor | None, format: str, seed: Tensor | None = None, *, saturate: bool = True
) -> Tensor:
    check_floating("input", x)
    check_seed(seed)
    found = _check_format(format, saturate)
    return floating.fake_quantize_float(x, _ready(x, scale), found, saturate, seed)


def _backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    found = floating.fake_quantize_float_backward(grad, a.input, _ready(a.input, a.scale), float_format(a.format))
    return {"input": found}


def _quantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype, *, saturate: bool = True) -> Tensor:
    check_floating("input", x)
    found = float_format(_check_float8(dtype, "dtype"))
    value = floating.quantize_float(x, _ready(x, scale), found, saturate).to(torch.float32)
    return value.to(dtype) if saturate or not found.has_infinity else _with_infinities(value, dtype)


def _with_infinities(value: Tensor, dtype: torch.dtype) -> Tensor:
    """e5m2 with ±inf as they are: the instruction that casts on a GPU makes ±max of them."""
    bits = value.to(dtype).view(torch.uint8).to(torch.int32)
    infinite = torch.where(value > 0, 0x7C, 0xFC)
    return torch.where(value.isinf(), infinite, bits).to(torch.uint8).view(dtype)


def _dequantize(code: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    _check_float8(code.dtype, "code")
    if dtype not in _RESULTS:
        raise InvalidArgument(
            f"`dtype` must be one of {', '.join(map(scalar_type, _RESULTS))}: got {dtype}. Dequantize to one of them."
        )
    return floating.dequantize_float(code, _ready(code, scale), dtype)


# No `lift`: the random numbers of a seed follow from positions, which a batch in front would change.
FAKE_QUANTIZE_FLOAT = define(
    "fake_quantize_float(Tensor input, Tensor? scale, str format, Tensor? seed=None, *, bool saturate=True) -> Tensor",
    _fake_quantize,
    backward=_backward,
    saves=("input", "scale"),
)
QUANTIZE_FLOAT = define(
    "quantize_float(Tensor input, Tensor? scale, ScalarType dtype, *, bool saturate=True) -> Tensor",
    _quantize,
    lift=lambda x, *rest: (x, *rest),
)
DEQUANTIZE_FLOAT = define(
    "dequantize_float(Tensor code, Tensor? scale, ScalarType dtype=float) -> Tensor",
    _dequantize,
    lift=lambda x, *rest: (x, *rest),
)


def _as_scale(scale: float | Tensor | None, x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor | None:
    if axis is not None:
        if not isinstance(scale, Tensor) or scale.dim() != 1:
            shape = tuple(scale.shape) if isinstance(scale, Tensor) else scale
            raise InvalidArgument(f"`scale` must be a vector where `axis` is given: got {shape}. Leave `axis` out.")
        if not -x.dim() <= axis < x.dim() or scale.shape[0] != x.shape[axis]:
            raise InvalidArgument(
                f"`axis` must name a dimension as long as `scale`: got {axis} for an input of shape {tuple(x.shape)} "
                f"and a scale of {scale.shape[0]}. Count dimensions from 0."
            )
        return per_channel_view(scale, x.dim(), axis)
    if scale is None or isinstance(scale, Tensor):
        return scale
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.full((), scale, dtype=wide, device=x.device)


def fake_quantize_float(
    input: Tensor,
    scale: float | Tensor | None = None,
    format: str | tuple[int, int] | FloatFormat = "e4m3",
    *,
    axis: int | None = None,
    saturate: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Rounds to a small floating-point format and back: y = round(x / scale) · scale.

    Args:
        input: any floating dtype and shape; y has both. Arithmetic in float32, in float64 for float64, and one
            rounding to the input's dtype at the end.
        scale: None (1), a number, a tensor of one element, a tensor that broadcasts to the input, or with ``axis`` a
            vector of one scale per channel. It follows IEEE arithmetic: 0 or NaN gives NaN, a sign cancels.
        format: a name of `fxquant.formats.FLOAT_FORMATS`, (exponent bits, mantissa bits), or the format.
        axis: the channel axis of a vector ``scale``.
        saturate: what lies beyond ±max, ±inf too, becomes ±max. Else what rounds beyond becomes ±inf (e5m2) or NaN
            (e4m3), as in an 8-bit cast that does not saturate.
        seed: rounds up or down by chance instead, reproducibly: see `fake_quantize_stochastic`.

    NaN stays NaN in every format; zeros keep their sign. Gradient: dy where |x / scale| ≤ max, 0 elsewhere and for
    NaN; none to scale.

    Raises:
        InvalidArgument: an unknown format, ``saturate=False`` for a format with neither infinity nor NaN, a scale that
            does not fit, a seed of another dtype or shape.
        NotImplementedError: an integer input or scale.

    Source: OCP OFP8 and MX v1.0 specifications.

    >>> fake_quantize_float(torch.tensor([0.3, 5.1, 1000.0]), format="e2m1")
    tensor([0.5000, 6.0000, 6.0000])
    """
    seed = None if seed is None else as_seed(seed, input)
    return FAKE_QUANTIZE_FLOAT(
        input, _as_scale(scale, input, axis, input.dtype), float_format(format).name, seed, saturate=saturate
    )


def quantize_float(
    input: Tensor,
    scale: float | Tensor | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    axis: int | None = None,
    saturate: bool = True,
) -> Tensor:
    """The 8-bit tensor of x / scale, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``: ONNX QuantizeLinear.

    ``input``, ``scale``, ``axis`` and ``saturate`` as in `fake_quantize_float`, which is this and `dequantize_float`
    in one. float64 is divided and rounded as float64. NaN stays NaN. No gradient.

    Raises:
        InvalidArgument: another dtype; a scale that does not fit.
        NotImplementedError: an integer input or scale.
    """
    return QUANTIZE_FLOAT(input, _as_scale(scale, input, axis, input.dtype), dtype, saturate=saturate)


def dequantize_float(
    code: Tensor, scale: float | Tensor | None, dtype: torch.dtype = torch.float32, *, axis: int | None = None
) -> Tensor:
    """code · scale in ``dtype``, from an 8-bit floating tensor: ONNX DequantizeLinear.

    The product is float32 (float64 for float64), rounded once to ``dtype``. NaN and ±inf stay. No gradient.

    Raises:
        InvalidArgument: a code that is not float8_e4m3fn or float8_e5m2; a dtype that is not a plain floating one; a
            scale that does not fit.
    """
    return DEQUANTIZE_FLOAT(code, _as_scale(scale, code, axis, dtype), dtype)
