"""Random numbers that depend on a seed and a place only, and rounding by them.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of a 128-bit
counter under a 64-bit key. There is no generator state, so eager code, compiled code, forward and backward draw the
same number for the same element, in any order and for any layout::

    counter = (index low, index high, offset low, offset high)    index: row-major position of the element
    key     = (seed low, seed high)
    u       = (word 0 >> 8) · 2^−24                               in [0, 1)

32-bit words are held in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.affine import clamp_code, clip_mask, dequantize

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product.

    From 48-bit products: a full one would overflow int64, which is undefined in C++, and a compiler that assumes
    otherwise drops the masks that would repair it.
    """
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four output words of each counter; words are int64 tensors in [0, 2^32) that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(_ROUNDS):
        if turn:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _WORD, (value >> 32) & _WORD


def uniform(seed: Tensor, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One multiple of 2^−24 in [0, 1) for each element of ``like``; ``seed`` is int64 [2]: seed and offset."""
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device).reshape(like.shape)
    key, offset = _split(seed[0]), _split(seed[1])
    word = philox((*_split(index), *offset), key)[0]
    return (word >> 8).to(dtype) * 2.0**-24


def round_by_chance(x: Tensor, uniform: Tensor) -> Tensor:
    """``floor(x) + [u < x − floor(x)]``: x on average, and x itself where it is an integer. NaN stays NaN."""
    below = x.floor()
    return below + (uniform < x - below).to(x.dtype)


def code_before_clamp(x: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor) -> Tensor:
    """``round_by_chance(x / scale) + zero_point``, in float and not yet clamped; NaN where x is NaN."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    steps = wide / scale.to(wide.dtype)
    return round_by_chance(steps, uniform(seed, x, wide.dtype)) + zero_point.to(wide.dtype)


def fake_quantize_stochastic(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, seed: Tensor
) -> Tensor:
    """Scale and zero point broadcast against x."""
    code = clamp_code(code_before_clamp(x, scale, zero_point, seed), quant_min, quant_max)
    return dequantize(code, scale.to(code.dtype), zero_point).to(x.dtype)


def fake_quantize_stochastic_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, seed: Tensor
) -> Tensor:
    """``grad`` where forward's own code, drawn again, lies in the range; 0 elsewhere."""
    inside = clip_mask(code_before_clamp(x, scale, zero_point, seed), quant_min, quant_max)
    return torch.where(inside, grad, 0.0)
