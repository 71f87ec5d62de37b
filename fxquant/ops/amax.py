"""``fxquant::tensor_quant`` and its relatives: quantizers whose range is the largest magnitude, ``amax``.

The arithmetic, with its equations, is `fxquant.numerics.amax`; the API that NVIDIA ModelOpt users know is
`fxquant.tensor_quant`. ``amax`` broadcasts to the input: one element, one per slice of an axis, or of several axes.

Static arguments are checked eagerly and while compiling. Values (a negative, NaN or infinite amax, negative inputs
of an unsigned format) are checked where a look is free, that is eagerly on CPU; ``check=True`` asserts them in
compiled code and on other devices too, as a RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import amax as numerics
from fxquant.numerics.formats import float_format
from fxquant.ops import amax_checks as checks
from fxquant.ops.checks import assert_values
from fxquant.ops.library import define, same_arguments


def _tensor_quant(
    input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    checks.check_static(input, amax, num_bits, unsigned)
    return numerics.tensor_quant(input, amax, num_bits, unsigned, narrow_range)


def _fake(input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True) -> Tensor:
    checks.check_static(input, amax, num_bits, unsigned)
    return numerics.fake_tensor_quant(input, amax, num_bits, unsigned, narrow_range)


def _legacy(
    input: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    checks.check_static(input, amax, num_bits, unsigned)
    return numerics.legacy_fake_tensor_quant(input, amax, num_bits, unsigned, narrow_range)


def _affine(input: Tensor, min: Tensor, max: Tensor, num_bits: int = 8) -> Tensor:
    checks.check_affine(input, min, max, num_bits)
    return numerics.fake_affine_tensor_quant(input, min, max, num_bits)


def _float(input: Tensor, amax: Tensor | None, E: int = 4, M: int = 3) -> Tensor:
    checks.check_float(input, amax, E, M)
    return numerics.scaled_float(input, amax, float_format((E, M)))


def _clipped(a: Any, grad: Tensor, *_: Tensor) -> dict[str, Tensor | None]:
    return {"input": numerics.clipped(grad, a.input, a.amax)}


def _clipped_float(a: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"input": numerics.scaled_float_clipped(grad, a.input, a.amax, float_format((a.E, a.M)))}


def _learnable_gradient(a: Any, grad: Tensor) -> dict[str, Tensor | None]:
    rest = (a.num_bits, a.unsigned, a.narrow_range)
    amax = numerics.fake_tensor_quant_amax_gradient(grad, a.input, a.amax, *rest)
    return {"input": numerics.clipped(grad, a.input, a.amax), "amax": amax}


def _learnable_float_gradient(a: Any, grad: Tensor) -> dict[str, Tensor | None]:
    amax = numerics.scaled_float_amax_gradient(grad, a.input, a.amax, float_format((a.E, a.M)))
    return {**_clipped_float(a, grad), "amax": amax}


def _through(a: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"input": grad}


_INTEGER = "Tensor input, Tensor amax, int num_bits=8, bool unsigned=False, bool narrow_range=True"
_FLOAT = "int E=4, int M=3"

TENSOR_QUANT = define(
    f"tensor_quant({_INTEGER}) -> (Tensor, Tensor)",
    _tensor_quant,
    check=checks.check_scale,
    backward=_clipped,
    saves=("input", "amax"),
)
FAKE_TENSOR_QUANT = define(
    f"fake_tensor_quant({_INTEGER}) -> Tensor", _fake, check=checks.check_values, backward=_clipped, lift=same_arguments
)
FAKE_TENSOR_QUANT_PASS_THROUGH = define(
    f"fake_tensor_quant.pass_through({_INTEGER}) -> Tensor",
    _fake,
    check=checks.check_values,
    backward=_through,
    saves=(),
    lift=same_arguments,
)
FAKE_TENSOR_QUANT_LEARNABLE = define(
    f"fake_tensor_quant_learnable({_INTEGER}) -> Tensor",
    _fake,
    check=checks.check_learnable_values,
    backward=_learnable_gradient,
    lift=same_arguments,
)
LEGACY_FAKE_TENSOR_QUANT = define(
    f"legacy_fake_tensor_quant({_INTEGER}) -> Tensor",
    _legacy,
    check=checks.check_scale,
    backward=_clipped,
    lift=same_arguments,
)
FAKE_AFFINE_TENSOR_QUANT = define(
    "fake_affine_tensor_quant(Tensor input, Tensor min, Tensor max, int num_bits=8) -> Tensor",
    _affine,
    check=checks.check_affine_values,
    backward=lambda a, grad: {"input": numerics.between(grad, a.input, a.min, a.max)},
    lift=same_arguments,
)
SCALED_FLOAT = define(
    f"scaled_float(Tensor input, Tensor? amax, {_FLOAT}) -> Tensor",
    _float,
    check=checks.check_float_values,
    backward=_clipped_float,
    lift=same_arguments,
)
SCALED_FLOAT_PASS_THROUGH = define(
    f"scaled_float.pass_through(Tensor input, Tensor? amax, {_FLOAT}) -> Tensor",
    _float,
    check=checks.check_float_values,
    backward=_through,
    saves=(),
    lift=same_arguments,
)
SCALED_FLOAT_LEARNABLE = define(
    f"scaled_float_learnable(Tensor input, Tensor amax, {_FLOAT}) -> Tensor",
    _float,
    check=checks.check_learnable_float_values,
    backward=_learnable_float_gradient,
    lift=same_arguments,
)


def _tensor(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), value, dtype=dtype, device=like.device)


def _assert_integer(input: Tensor, amax: Tensor, unsigned: bool) -> None:
    assert_values((amax >= 0) & (amax < float("inf")), "amax must be finite and at least 0.")
    if unsigned:
        assert_values(~(input < 0), checks.UNSIGNED)


def tensor_quant(
    input: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantizes to integer-valued codes; ``codes / scale`` dequantizes.

    ``B = 2^(num_bits − 1 + unsigned) − 1``, ``scale = B / amax``, ``codes = clamp(round_half_even(input · scale),
    lowest, B)`` with ``lowest`` 0 if unsigned, −B if ``narrow_range``, else −B − 1. Where amax ≤ 2⁻²⁴ codes are 0 and
    the scale is 1. NaN stays NaN elsewhere.

    Args:
        input: any floating dtype; float16 and bfloat16 are computed in float32 (bfloat16 holds codes up to 256
            exactly, float16 up to 2048).
        amax: a number, or a floating tensor that broadcasts to input.
        check: assert values in compiled code too.

    Returns:
        Codes in input's shape and dtype; the scale in amax's shape and input's dtype.

    Gradient: ``d_input = d_codes · [|input| ≤ amax]``; none to amax, none from the scale.

    Raises:
        TypeError: negative input of an unsigned format.
        InvalidArgument: (a ValueError) amax negative, NaN, infinite, not broadcastable, on another device, or too
            small for a float16 scale; num_bits not from 2 (1 if unsigned) to 16.

    Source: NVIDIA ModelOpt, ``TensorQuantFunction``.

    >>> tensor_quant(torch.tensor([-2.0, 0.3, 1.0]), 1.0, 4)
    (tensor([-7.,  2.,  7.]), tensor(7.))
    """
    reach = _tensor(amax, input)
    out = TENSOR_QUANT(input, reach, num_bits, unsigned, narrow_range)
    if check:
        _assert_integer(input, reach, unsigned)
    return out


def fake_tensor_quant(
    input: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    pass_through: bool = False,
    check: bool = False,
) -> Tensor:
    """Quantizes and dequantizes: ``codes / scale`` of `tensor_quant`, with one rounding to input's dtype.

    Shape and dtype of the result are input's. Gradient: ``d_input = d_out · [|input| ≤ amax]``, or ``d_out`` itself
    with ``pass_through=True``, which keeps nothing for backward; none to amax (`fake_tensor_quant_learnable` has
    one). Arguments and errors are those of `tensor_quant`; no limit on a float16 scale, as none is stored.

    Source: NVIDIA ModelOpt, ``FakeTensorQuantFunction``.

    >>> fake_tensor_quant(torch.tensor([-2.0, 0.3, 1.0]), 1.0, 4)
    tensor([-1.0000,  0.2857,  1.0000])
    """
    reach = _tensor(amax, input)
    op = FAKE_TENSOR_QUANT_PASS_THROUGH if pass_through else FAKE_TENSOR_QUANT
    out = op(input, reach, num_bits, unsigned, narrow_range)
    if check:
        _assert_integer(input, reach, unsigned)
    return out


def fake_tensor_quant_learnable(
    input: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    check: bool = False,
) -> Tensor:
    """`fake_tensor_quant` whose amax is trained.

    ``d_amax = Σ d_out · (codes − [|input| ≤ amax] · input · scale) / B``, summed over what an element of amax stands
    for, in amax's dtype: the lowest or highest code where input is clipped, the rounding error inside. An amax of at
    most 2⁻²⁴, negative ones too, gives output 0 and ``d_amax = Σ d_out · sign(input)``, so that it can grow again.
    Values are checked as in `tensor_quant`, but for the sign of amax.

    Source: the straight-through derivative of clipping before rounding (Jain et al., "Trained Quantization
    Thresholds", 2020).
    """
    out = FAKE_TENSOR_QUANT_LEARNABLE(input, amax, num_bits, unsigned, narrow_range)
    if check:
        assert_values(amax.isfinite(), "amax must be finite.")
        if unsigned:
            assert_values(~(input < 0), checks.UNSIGNED)
    return out


def legacy_fake_tensor_quant(
    input: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    check: bool = False,
) -> Tensor:
    """`fake_tensor_quant` from codes and scale that were rounded to input's dtype first.

    The quotient of what `tensor_quant` returns; differs from `fake_tensor_quant` for float16 and bfloat16 only.
    Arguments, gradient and errors are those of `tensor_quant`.

    Source: NVIDIA ModelOpt, ``LegacyFakeTensorQuantFunction``.
    """
    reach = _tensor(amax, input)
    out = LEGACY_FAKE_TENSOR_QUANT(input, reach, num_bits, unsigned, narrow_range)
    if check:
        _assert_integer(input, reach, unsigned)
    return out


def fake_affine_tensor_quant(
    input: Tensor, min: Tensor | float, max: Tensor | float, num_bits: int = 8, *, check: bool = False
) -> Tensor:
    """Quantizes and dequantizes between ``min`` and ``max``, zero exactly representable.

    ``step = (max − min) / (2^num_bits − 1)``, ``zero = round(min / step) + 2^(num_bits − 1)``,
    ``y = (clamp(round(input / step) − zero, −2^(num_bits − 1), 2^(num_bits − 1) − 1) + zero) · step``.
    NaN stays NaN. Shape and dtype of the result are input's; min and max are numbers, or tensors that broadcast.

    Gradient: ``d_input = d_out · [min ≤ input ≤ max]``; none to min and max.

    Raises InvalidArgument where max is not above min; in compiled code without ``check`` the result is 0 there.

    Source: NVIDIA ModelOpt, ``FakeAffineTensorQuantFunction`` (gemmlowp's scheme).
    """
    low, high = _tensor(min, input), _tensor(max, input)
    out = FAKE_AFFINE_TENSOR_QUANT(input, low, high, num_bits)
    if check:
        assert_values((low < high) & ((high - low) < float("inf")), "max must be above min, both finite.")
    return out


def scaled_float(
    input: Tensor,
    amax: Tensor | float | None = None,
    E: int = 4,
    M: int = 3,
    *,
    pass_through: bool = False,
    check: bool = False,
) -> Tensor:
    """Rounds to the float format with E exponent and M mantissa bits, scaled so that amax is its largest value.

    ``y = round_to_format(input · (max / amax)) · (amax / max)``, saturating at ±amax; ``max`` is 448 for (4, 3).
    Without amax a bare cast, saturating at ±max. amax ≤ 2⁻²⁴ counts as 1. NaN stays NaN. Shape and dtype of the
    result are input's.

    Gradient: ``d_input = d_out · [|input| ≤ amax]`` (≤ max without amax), or ``d_out`` itself with
    ``pass_through=True``, which keeps nothing for backward; none to amax.

    Raises InvalidArgument for an unknown (E, M) and for an amax that is negative, NaN or infinite.

    Source: NVIDIA ModelOpt, ``ScaledE4M3Function``; formats are those of `fxquant.formats`.

    >>> scaled_float(torch.tensor([0.3, 44.0, 1000.0]))
    tensor([3.1250e-01, 4.4000e+01, 4.4800e+02])
    """
    reach = None if amax is None else _tensor(amax, input)
    out = (SCALED_FLOAT_PASS_THROUGH if pass_through else SCALED_FLOAT)(input, reach, E, M)
    if check and reach is not None:
        assert_values((reach >= 0) & (reach < float("inf")), "amax must be finite and at least 0.")
    return out


def scaled_float_learnable(input: Tensor, amax: Tensor, E: int = 4, M: int = 3, *, check: bool = False) -> Tensor:
    """`scaled_float` whose amax is trained.

    ``d_amax = Σ d_out · (f − [|input| ≤ amax] · input · max/amax) / max`` with f the rounded float before it is scaled
    back; ``Σ d_out · sign(input)`` where amax ≤ 2⁻²⁴, negative values too. Values are checked as in `scaled_float`,
    but for the sign of amax.
    """
    out = SCALED_FLOAT_LEARNABLE(input, amax, E, M)
    if check:
        assert_values(amax.isfinite(), "amax must be finite.")
    return out


OPS = (
    TENSOR_QUANT,
    FAKE_TENSOR_QUANT,
    FAKE_TENSOR_QUANT_PASS_THROUGH,
    FAKE_TENSOR_QUANT_LEARNABLE,
    LEGACY_FAKE_TENSOR_QUANT,
    FAKE_AFFINE_TENSOR_QUANT,
    SCALED_FLOAT,
    SCALED_FLOAT_PASS_THROUGH,
    SCALED_FLOAT_LEARNABLE,
)
