"""Runs what Inductor wrote for CUDA on the CPU, kernels in Triton's interpreter.

The interpreter computes operation by operation with numpy, so this shows what the written kernels mean. What a
compiler makes of them, divisions and contractions, is seen in PTX only.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

_STREAM = r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$"
_LIBDEVICE: dict[str, Callable[..., Any]] = {
    "nearbyint": np.rint,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "copysign": np.copysign,
    "floor": np.floor,
    "ceil": np.ceil,
}


def run(written: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of the file's ``call``, for CPU tensors."""
    source = written.replace("guards._empty_strided_cuda", "guards._empty_strided_cpu")
    source = re.sub(_STREAM, "get_raw_stream = int", source, flags=re.MULTILINE)
    source = source.replace("device(type='cuda', index=0)", "device('cpu')")
    namespace: dict[str, Any] = {"__name__": "written"}
    with _interpreted():
        exec(compile(source, "written", "exec"), namespace)
        return list(namespace["call"](list(inputs)))


class _Kernel:
    """A kernel as the file calls it, in one program that covers everything."""

    def __init__(self, _: Any, name: str, source: str, **__: Any) -> None:
        from torch._inductor.codecache import PyCodeCache

        module = PyCodeCache.load(source)
        module.libdevice = types.SimpleNamespace(**{n: functools.partial(_apply, f) for n, f in _LIBDEVICE.items()})
        self.function = getattr(module, name).fn  # after Inductor's choice of a configuration

    def run(self, *args: Any, stream: Any) -> None:
        import triton

        names = self.function.arg_names
        given = dict(zip(names, args, strict=False))
        numels = {n.removesuffix("numel").upper(): v for n, v in given.items() if n.endswith("numel")}
        blocks = {f"{axis}BLOCK": triton.next_power_of_2(numel) for axis, numel in numels.items()}
        self.function[(1, 1, 1)](*args, **{name: size for name, size in blocks.items() if name in names[len(args) :]})


def _apply(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function of libdevice, which the interpreter has none of, on its tensors."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    result = function(*(argument.handle.data for argument in arguments))
    scalar = tl.int1 if result.dtype == bool else arguments[0].dtype
    kind = arguments[0].type
    kind = tl.block_type(scalar, list(kind.shape)) if kind.is_block() else scalar
    return tl.core.tensor(TensorHandle(result, scalar), kind)


def _cast(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Casts from and to types that numpy has not as a GPU does them: half to even, subnormals kept, 8 bits saturated.

    The interpreter truncates, and takes NaN of 8 bits for a number.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def cast(builder: Any, source: Any, wanted: Any, *rest: Any) -> Any:
        here, there = source.dtype.scalar, wanted.scalar
        data = torch.from_numpy(np.array(source.data))  # a copy: broadcast data is read-only
        if here in narrow and there in (tl.float32, tl.float16):
            wide = torch.float32 if there == tl.float32 else torch.float16
            bytes_of = data.view(torch.int16) if here == tl.bfloat16 else data
            return TensorHandle(bytes_of.view(narrow[here]).to(wide).numpy(), there)
        if there in narrow and here not in narrow:
            kind = narrow[there]
            if kind.itemsize == 1:
                data = data.clamp(-torch.finfo(kind).max, torch.finfo(kind).max)
            stored = data.to(kind).view(torch.uint8 if kind.itemsize == 1 else torch.int16).numpy()
            return TensorHandle(stored.view(np.uint8 if kind.itemsize == 1 else np.uint16), there)
        return theirs(builder, source, wanted, *rest)

    return cast


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.interpreter import InterpreterBuilder

    with contextlib.ExitStack() as stack:
        put = lambda *where: stack.enter_context(mock.patch.object(*where))  # noqa: E731
        put(AsyncCompile, "triton", lambda *args, **kwargs: _Kernel(*args, **kwargs))
        put(AsyncCompile, "wait", lambda *_: None)
        for name in ("cast_impl", "create_fp_to_fp"):
            put(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
        put(triton_helpers, "set_driver_to_gpu", lambda: None)
        put(torch.cuda, "_DeviceGuard", contextlib.nullcontext)
        put(torch.cuda, "set_device", lambda *_: None)
        with np.errstate(all="ignore"):
            yield
