"""Whether Inductor will find a compiler, said early and in words."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from fxquant.errors import CompilerMissing


def require_compiler(example_inputs: Sequence[Any]) -> None:
    """Says early, and in words, that Inductor will find no compiler for a device."""
    devices = {t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}
    if "cuda" in devices and importlib.util.find_spec("triton") is None:
        raise CompilerMissing(
            "backend 'fxquant' must find Triton to run on CUDA: found none. Install triton, or use "
            "backend='fxquant_eager', whose operators run on kernels of fxquant's own."
        )
    if "cpu" in devices:
        cpp_compiler()


def cpp_compiler() -> str:
    """The C++ compiler that Inductor calls. CompilerMissing where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # private; tried on 2.13 and 2.15
    from torch._inductor.exc import InvalidCxxCompiler  # private; tried on 2.13 and 2.15

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler as error:
        raise CompilerMissing(
            "backend 'fxquant' must find a C++ compiler to run on CPU: found none. Install g++ or clang++, point "
            "CXX at one, or use backend='fxquant_eager', which needs none."
        ) from error
