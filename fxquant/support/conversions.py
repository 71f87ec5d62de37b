"""Conversions of two vectors of integers at once, in operations that the C++ of torch's headers has vectors for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WORDS = {torch.int32: "int32_t", torch.float32: "float"}
_BYTES = {torch.int8: "int8_t", torch.uint8: "uint8_t"}


def in_vectors(
    expression: Callable[..., str],
    self: Any,
    src: Any,
    dtype: torch.dtype,
    src_dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> str:
    """The C++ of a conversion, ``expression``'s own or one of the same bits that is not computed number by number.

    A loop that reads halves holds two vectors of floats or 32-bit integers for each vector of halves. Of such pairs
    torch's headers convert floats to bytes and back by vector instructions. Between int32 and float, and between int32
    and bytes, they convert number by number, in a loop that Inductor tells the compiler not to vectorize.
    """
    own = expression(self, src, dtype, src_dtype, *args, **kwargs)
    if not src.is_vec or args or kwargs:
        return own
    width, wanted = (self._get_num_vectors(each) for each in (src_dtype, dtype))
    if (width, wanted) == (2, 2) and {src_dtype, dtype} == set(_WORDS):
        return _pair(dtype, (f"{src}[{i}]" for i in range(2)))
    if (width, wanted) == (2, 1) and src_dtype is torch.int32 and dtype in _BYTES:
        floats = _pair(torch.float32, (_low_byte(f"{src}[{i}]", signed=dtype.is_signed) for i in range(2)))
        return f"at::vec::convert<{_BYTES[dtype]},1,float,2>({floats})"
    if (width, wanted) == (1, 2) and src_dtype in _BYTES and dtype is torch.int32:
        floats = f"at::vec::convert<float,2,{_BYTES[src_dtype]},1>({src})"
        return _pair(dtype, (f"{floats}[{i}]" for i in range(2)))
    return own


def _pair(dtype: torch.dtype, vectors: Any) -> str:
    each = ", ".join(f"at::vec::convert<{_WORDS[dtype]}>({vector})" for vector in vectors)
    return f"at::vec::VectorizedN<{_WORDS[dtype]},2>({each})"


def _low_byte(vector: str, *, signed: bool) -> str:
    """The number that the low byte of each 32-bit integer is: what C++ makes of it, for numbers of any size."""

    def constant(value: int) -> str:
        return f"at::vec::Vectorized<int32_t>({value})"

    byte = f"({vector} & {constant(255)})"
    return f"(({byte} ^ {constant(128)}) - {constant(128)})" if signed else byte
