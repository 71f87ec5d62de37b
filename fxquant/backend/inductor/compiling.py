"""What lets Inductor compile our graphs in less time."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fxquant.backend.inductor.loops import is_ours

_CALL = "async_compile.cpp_pybinding("
_RARELY = 1000  # the last of gc.get_threshold(), by default 10


class _Compiles:
    """Those under way, in all threads: the first finds the thresholds that the last puts back."""

    lock = threading.Lock()
    count = 0
    thresholds = gc.get_threshold()


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Inside, Python looks for reference cycles among old objects less often.

    A compile makes some hundred thousand objects that stay until it ends, and Python looks through all of them again
    and again: a tenth of the time that it spends on a quantized graph of seven convolutions. Young objects, and so most
    garbage, are looked at as before. torch 2.15 does the same for any backend; there this does nothing.
    """
    if hasattr(torch._dynamo.config, "gc_gen2_threshold_during_compile"):
        yield
        return
    with _Compiles.lock:
        if not _Compiles.count:
            _Compiles.thresholds = young, middle, old = gc.get_threshold()
            gc.set_threshold(young, middle, max(old, _RARELY))
        _Compiles.count += 1
    try:
        yield
    finally:
        with _Compiles.lock:
            _Compiles.count -= 1
            if not _Compiles.count:
                gc.set_threshold(*_Compiles.thresholds)


@functools.cache
def compile_as_generated() -> None:
    """Tells Inductor, once a process; what others compile stays as it is.

    Inductor generates the code of all kernels of a graph, then hands them to the compiler. Handed over each as it is
    complete, they are compiled while Python generates the next. Inductor asks for the same source again later, and is
    given the compilation that is under way.

    A quantized graph has twice the nodes of a plain one, and so twice the time that Python takes. With as many kernels
    as before it leaves a processor idle for as long.
    """
    # Private; tried on 2.13 and 2.15, read in 2.11.
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    define = PythonWrapperCodegen.define_kernel

    @functools.wraps(define)
    def define_and_compile(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
        if kernel_body.startswith(_CALL) and is_ours() and get_compile_threads() > 1:
            call = ast.parse(kernel_body.strip(), mode="eval").body
            assert isinstance(call, ast.Call), "a call of async_compile.cpp_pybinding"
            AsyncCompile().cpp_pybinding(*map(ast.literal_eval, call.args))
        return define(self, kernel_name, kernel_body, *args, **kwargs)

    PythonWrapperCodegen.define_kernel = define_and_compile  # type: ignore[method-assign]
