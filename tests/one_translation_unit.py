"""Kernels of Inductor, in test sessions, many in one g++ run: as they are written, with the same flags.

Inductor compiles each kernel alone. Four fifths of that are the same for all: templates of its header are instantiated,
Python's header is read, torch is linked (0.5 s of 0.6 s for a small one). Here kernels wait until one is called,
and then all are compiled, as namespaces of one source: those of a forward and of its backward at least. What nobody has
called is compiled when its test ends, so that what g++ refuses fails there.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import clear_on_fresh_cache

INCLUDE = re.compile(r"^ *#include .*\n", re.MULTILINE)
LOCK = threading.RLock()
ORIGINAL = AsyncCompile.cpp_pybinding
# Private; tried on 2.13: what is replaced, subclassed or called, and the parameters that are counted on.
KNOWN = {
    "AsyncCompile.cpp_pybinding": (ORIGINAL, ("self", "argtypes", "source_code")),
    "load_pybinding_async": (CppPythonBindingsCodeCache.load_pybinding_async, ("argtypes", "main_code")),
    "load_async": (CppPythonBindingsCodeCache.load_async, ("main_code",)),
    "_load_library_inner": (CppPythonBindingsCodeCache._load_library_inner, ("path", "key")),
}


class CompiledAlone(UserWarning):
    """Kernels are compiled one by one: this torch, or what it writes, is not as this file knows it."""


class Kernel:
    """Stands for one; called, it is compiled, with all that wait."""

    def __init__(self, argtypes: Sequence[str], source: str) -> None:
        self.argtypes, self.source = list(argtypes), source
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if self.compiled is None:
            compile_waiting()
        if self.compiled is None:  # another that waited with it was refused
            compile_each([self])
        assert self.compiled is not None
        self.compiled(*args)


KERNELS: dict[tuple[str, ...], Kernel] = {}
WAITING: list[Kernel] = []
clear_on_fresh_cache(SimpleNamespace(cache_clear=KERNELS.clear))


class Written(Exception):
    """The source of a kernel with its bindings, in the place of the library."""


def named(number: int, **attributes: Any) -> type[CppPythonBindingsCodeCache]:
    """torch's bindings, of a kernel by another name."""
    name = f"kernel_{number}"
    return type(name, (CppPythonBindingsCodeCache,), {"entry_function": name, **attributes})


def namespace(number: int, kernel: Kernel) -> tuple[list[str], str]:
    """Its includes, and the rest, where ``kernel`` has a name of its own."""

    def load_async(cls: type, main_code: str, *args: Any, **kwargs: Any) -> None:
        raise Written(main_code)

    try:
        named(number, load_async=classmethod(load_async)).load_pybinding_async(kernel.argtypes, kernel.source)
    except Written as written:
        source = f"{written}\n"
    name, body = f"kernel_{number}", INCLUDE.sub("", source)
    return INCLUDE.findall(source), f"#define kernel {name}\nnamespace {name} {{\n{body}}}\n#undef kernel\n"


class Libraries(CppPythonBindingsCodeCache):
    """Compiled, locked and kept in Inductor's cache as a kernel's; what is loaded says where it lies."""

    cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012 - of the class, as torch's
    cache_clear = staticmethod(cache.clear)

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return SimpleNamespace(path=path)


clear_on_fresh_cache(Libraries)


def compile_together(kernels: Sequence[Kernel]) -> None:
    """One library, in which each kernel is a Python module of its own."""
    parts = [namespace(number, kernel) for number, kernel in enumerate(kernels)]
    includes = dict.fromkeys(line.strip() + "\n" for lines, _ in parts for line in lines)
    library = Libraries.load("".join([*includes, *(body for _, body in parts)]))
    for number, kernel in enumerate(kernels):
        bindings = named(number)
        module = bindings._load_library_inner(library.path, library.key)
        kernel.compiled = getattr(module, bindings.entry_function)


def compile_each(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        kernel.compiled = CppPythonBindingsCodeCache.load_pybinding(kernel.argtypes, kernel.source)


def compile_waiting() -> None:
    """What waits, all at once; one by one where that fails, which has the error of the one that g++ refuses."""
    with LOCK:
        kernels = list(WAITING)
        WAITING.clear()
        if len(kernels) < 2:
            compile_each(kernels)
            return
        try:
            compile_together(kernels)
        except (CppCompileError, ImportError) as error:
            compile_each(kernels)
            warnings.warn(f"{len(kernels)} kernels compile alone, not together: {error}", CompiledAlone, stacklevel=2)


def settings() -> dict[str, Any]:
    """Those of Inductor that say how g++ is called."""
    return {name: value for name, value in config.get_config_copy().items() if name.startswith(("cpp", "aot_inductor"))}


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inductor's kernels wait for each other; as ever, with a warning, on a torch that is not known."""
    for name, (function, wanted) in KNOWN.items():
        given = tuple(inspect.signature(function).parameters)
        if given[: len(wanted)] != wanted:
            warnings.warn(f"{name} takes {given}: kernels are compiled one by one", CompiledAlone, stacklevel=3)
            yield
            return
    usual = settings()

    @functools.wraps(ORIGINAL)
    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        if settings() != usual:
            return ORIGINAL(self, argtypes, source_code)
        with LOCK:
            kernel = KERNELS.get((*argtypes, source_code))
            if kernel is None:
                kernel = KERNELS[(*argtypes, source_code)] = Kernel(argtypes, source_code)
                WAITING.append(kernel)
        return kernel

    AsyncCompile.cpp_pybinding = cpp_pybinding
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = ORIGINAL
        compile_waiting()
