"""When the C++ that Inductor generates is compiled."""

from __future__ import annotations

import ast
import functools
from typing import Any

from fxquant.loops import is_ours

_CALL = "async_compile.cpp_pybinding("


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
