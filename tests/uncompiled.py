"""Steps whose kernels no C++ compiler sees: what they keep, move and launch is Inductor's; they compute zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache


@contextmanager
def kernels_write_zeros() -> Iterator[None]:
    """A g++ run of 0.7 s a kernel is most of a small net's compile, and bytes do not depend on values.

    Zeros, not whatever lay there: an index among them stays in bounds. Nothing compiled inside is taken over outside.
    """

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Callable[..., None]:
        written = [at for at, kind in enumerate(argtypes) if kind.endswith("*") and not kind.startswith("const")]
        assert written, source_code

        def kernel(*args: Any) -> None:
            for at in written:
                assert isinstance(args[at], Tensor)
                args[at].zero_()

        return kernel

    original = AsyncCompile.cpp_pybinding  # private; read in 2.13
    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = original  # type: ignore[method-assign]
        torch._dynamo.reset()
        PyCodeCache.cache_clear()
