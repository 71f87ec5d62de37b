"""The learnable quantizers and the fused observer, for the checks of every op, and references for their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from fxquant.ops import learnable, observe
from fxquant.ops.library import DECOMPOSITIONS
from tests.ops.cases import Case

# Value, gradient of x and summed gradients of the parameters, from (x, dy, parameters, numbers).
Reference = tuple[np.ndarray, ...]


def decomposing(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, with the arithmetic in the place of each op."""
    return compile_fx(gm, inputs, decompositions={**select_decomp_table(), **DECOMPOSITIONS})


def _switch(x: Tensor) -> Tensor:
    return torch.ones(1, dtype=torch.int64, device=x.device)


def _state(x: Tensor, count: int) -> tuple[Tensor, ...]:
    low = torch.linspace(-2.0, -1.0, count, device=x.device)
    return low, -low, torch.full_like(low, 0.1), torch.zeros_like(low, dtype=torch.int32)


OBSERVE_CASES = [
    Case(
        "moving_avg_qparams",
        observe.MOVING_AVG_QPARAMS,
        lambda x: (x, _switch(x), _switch(x), *_state(x, 1), 0.1, 0, 255, 0),
        grads=(),
        elementwise=False,
    ),
    Case(
        "moving_avg_qparams, rows, symmetric, delayed",
        observe.MOVING_AVG_QPARAMS,
        lambda x: (x, _switch(x), _switch(x), *_state(x, x.shape[1]), 0.1, -8, 7, 1, True, True, True),
        grads=(),
        elementwise=False,
    ),
    Case(
        "switched_fake_quantize",
        observe.SWITCHED_FAKE_QUANTIZE,
        lambda x: (x, _switch(x).bool(), *_state(x, 1)[2:], None, -8, 7),
    ),
    Case(
        "switched_fake_quantize, off",
        observe.SWITCHED_FAKE_QUANTIZE,
        lambda x: (x, ~_switch(x).bool(), *_state(x, 1)[2:], None, -8, 7),
    ),
    Case(
        "switched_fake_quantize, rows",
        observe.SWITCHED_FAKE_QUANTIZE,
        lambda x: (x, _switch(x).bool(), *_state(x, x.shape[1])[2:], 1, -8, 7),
        elementwise=False,
    ),
]


def _pair(x: Tensor, count: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Two parameters in float32."""
    scale = torch.linspace(0.1, 0.3, count, device=x.device)
    other = torch.linspace(low, high, count, device=x.device)
    return scale, other


def _number(x: Tensor, value: float) -> Tensor:
    return torch.full((1,), value, device=x.device)


AFFINE_GRADS = ("input", "scale", "zero_point")
LSQ_GRADS = ("input", "scale", "offset")
LEARNABLE_CASES = [
    Case(
        "learnable per tensor",
        learnable.LEARNABLE_PER_TENSOR,
        lambda x: (x, *_pair(x, 1, 2.5, 2.5), 0, 15),
        grads=AFFINE_GRADS,
    ),
    Case(
        "learnable per tensor, divide",
        learnable.LEARNABLE_PER_TENSOR,
        lambda x: (x, *_pair(x, 1, -0.6, 0.0), -8, 7, 0.5),
        {"rounding": "divide"},
        grads=AFFINE_GRADS,
    ),
    Case(
        "learnable per channel",
        learnable.LEARNABLE_PER_CHANNEL,
        lambda x: (x, *_pair(x, x.shape[1], -3.0, 3.0), 1, -8, 7, 0.5),
        grads=AFFINE_GRADS,
        elementwise=False,
    ),
    Case(
        "learnable per channel, divide",
        learnable.LEARNABLE_PER_CHANNEL,
        lambda x: (x, *_pair(x, x.shape[1], -3.0, 3.0), 1, -8, 7),
        {"rounding": "divide"},
        grads=AFFINE_GRADS,
        elementwise=False,
    ),
    Case("lsq+", learnable.LSQ_PLUS, lambda x: (x, *_pair(x, 1, -0.4, 0.0), 0, 7), grads=LSQ_GRADS),
    Case(
        "lsq+ per channel",
        learnable.LSQ_PLUS,
        lambda x: (x, *_pair(x, x.shape[1], -0.4, 0.4), -4, 3, 1),
        {"grad_factor": 0.5},
        grads=LSQ_GRADS,
        elementwise=False,
    ),
    Case("pact", learnable.PACT, lambda x: (x, _number(x, 1.3)), {"num_bits": 4}, grads=("input", "alpha")),
    Case(
        "pact, signed",
        learnable.PACT,
        lambda x: (x, _number(x, 1.3)),
        {"num_bits": 4, "signed": True},
        grads=("input", "alpha"),
    ),
    Case("tqt", learnable.TQT, lambda x: (x, _number(x, 0.3)), {"num_bits": 4}, grads=("input", "log2_threshold")),
    Case(
        "tqt, unsigned",
        learnable.TQT,
        lambda x: (x, _number(x, -0.3)),
        {"num_bits": 4, "signed": False},
        grads=("input", "log2_threshold"),
    ),
]
CASES = [*OBSERVE_CASES, *LEARNABLE_CASES]


def numpy_affine(x: Any, dy: Any, s: Any, zero_point: Any, low: int, high: int) -> Reference:
    z = np.clip(np.rint(zero_point), low, high)
    code = np.rint(x / s) + z
    y = (np.clip(code, low, high) - z) * s
    under, over = code < low, code > high
    per_scale = np.select([under, over], [low - z, high - z], (y - x) / s)
    return y, dy * ~(under | over), (dy * per_scale).sum(), -(s * dy)[under | over].sum()


def numpy_lsq_plus(x: Any, dy: Any, s: Any, offset: Any, low: int, high: int) -> Reference:
    u = (x - offset) / s
    n = np.rint(u)
    out = (n < low) | (n > high)
    per_scale = np.where(n < low, low, np.where(n > high, high, n - u))
    return np.clip(n, low, high) * s + offset, dy * ~out, (dy * per_scale).sum(), dy[out].sum()


def numpy_pact(x: Any, dy: Any, alpha: Any, bits: int, signed: bool) -> Reference:
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    least = -alpha if signed else 0 * alpha
    s = alpha / n
    inside = ((x > least) if signed else (x >= 0)) & (x < alpha)
    to_alpha = dy[x >= alpha].sum() - (dy[x <= least].sum() if signed else 0)
    return np.rint(np.clip(x, least, alpha) / s) * s, dy * inside, to_alpha


def numpy_tqt(x: Any, dy: Any, log2_t: Any, bits: int, signed: bool) -> Reference:
    s = math.ldexp(1.0, math.ceil(log2_t[0]) - (bits - 1 if signed else bits))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    n = np.rint(x / s)
    per_scale = np.where(n < low, low, np.where(n > high, high, n - x / s))
    return np.clip(n, low, high) * s, dy * ((n >= low) & (n <= high)), s * math.log(2) * (dy * per_scale).sum()


def through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` forward, the identity backward."""
    return x + (function(x) - x).detach()


def clamped(code: Tensor, low: int, high: int) -> Tensor:
    """The clamp whose gradient passes at its ends too; from torch 2.15 on, torch's own passes none there."""
    return torch.where((code >= low) & (code <= high), code, code.detach().clamp(low, high))


def ste_affine(x: Tensor, s: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    z = through(zero_point, lambda v: v.round().clamp(low, high))
    return (clamped(through(x / s, torch.round) + z, low, high) - z) * s


def ste_lsq_plus(x: Tensor, s: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    return clamped(through((x - offset) / s, torch.round), low, high) * s + offset


def ste_pact(x: Tensor, alpha: Tensor, bits: int, signed: bool) -> Tensor:
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    clipped = torch.maximum(torch.minimum(x, alpha), -alpha if signed else 0 * alpha)
    return through(clipped, lambda v: (v * n / alpha).round() * alpha / n)


def ste_tqt(x: Tensor, log2_t: Tensor, bits: int, signed: bool) -> Tensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    s = 2 ** through(log2_t, torch.ceil) / (2 ** (bits - 1) if signed else 2**bits)
    return clamped(through(x / s, torch.round), low, high) * s


DIVIDE: dict[str, Any] = {"rounding": "divide"}
# op, its references, the parameters, the numbers
MODELS: dict[str, tuple[Any, Any, Any, tuple[float, ...], tuple[Any, ...], dict[str, Any]]] = {
    "affine u4": (
        learnable.fake_quantize_learnable_per_tensor_affine,
        numpy_affine,
        ste_affine,
        (0.23, 5.0),
        (0, 15),
        DIVIDE,
    ),
    "affine s8": (
        learnable.fake_quantize_learnable_per_tensor_affine,
        numpy_affine,
        ste_affine,
        (0.023, -3.4),
        (-128, 127),
        DIVIDE,
    ),
    "affine, zero point at its end": (
        learnable.fake_quantize_learnable_per_tensor_affine,
        numpy_affine,
        ste_affine,
        (0.23, 8.2),
        (-8, 7),
        DIVIDE,
    ),
    "affine above 0": (
        learnable.fake_quantize_learnable_per_tensor_affine,
        numpy_affine,
        ste_affine,
        (0.23, 7.0),
        (5, 9),
        DIVIDE,
    ),
    "lsq+ u4": (learnable.fake_quantize_lsq_plus, numpy_lsq_plus, ste_lsq_plus, (0.17, -0.9), (0, 15), {}),
    "lsq+ s3": (learnable.fake_quantize_lsq_plus, numpy_lsq_plus, ste_lsq_plus, (0.4, 0.31), (-4, 3), {}),
    "pact u4": (learnable.fake_quantize_pact, numpy_pact, ste_pact, (1.3,), (4, False), {}),
    "pact u1": (learnable.fake_quantize_pact, numpy_pact, ste_pact, (1.3,), (1, False), {}),
    "pact s8": (learnable.fake_quantize_pact, numpy_pact, ste_pact, (1.7,), (8, True), {}),
    "pact s2": (learnable.fake_quantize_pact, numpy_pact, ste_pact, (0.7,), (2, True), {}),
    "tqt s8": (learnable.fake_quantize_tqt, numpy_tqt, ste_tqt, (0.3,), (8, True), {}),
    "tqt s3": (learnable.fake_quantize_tqt, numpy_tqt, ste_tqt, (1.0,), (3, True), {}),
    "tqt u4": (learnable.fake_quantize_tqt, numpy_tqt, ste_tqt, (-0.7,), (4, False), {}),
}
