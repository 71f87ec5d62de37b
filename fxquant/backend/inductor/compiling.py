"""What lets Inductor compile our graphs in less time."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

from fxquant.support.patches import CHANNELS_LAST, COMPILE_EARLY, CONVERSIONS, DTYPE_RULES

_RARELY = 1000  # the last of gc.get_threshold(), by default 10


class _Compiles:
    """Those under way, in all threads: the first finds the thresholds that the last puts back."""

    lock = threading.Lock()
    count = 0
    found = gc.get_threshold()
    set = gc.get_threshold()


@contextlib.contextmanager
def compiling_ours() -> Iterator[None]:
    """Inside, in this thread, Inductor is at work on a graph of ours."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(collecting_rarely())
        for patch in (DTYPE_RULES, COMPILE_EARLY, CHANNELS_LAST, CONVERSIONS):
            stack.enter_context(patch.acting())
        yield


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Inside, Python looks for reference cycles among old objects less often.

    A compile makes some hundred thousand objects that stay until it ends, and Python looks through all of them again
    and again: a tenth of the time that it spends on a quantized graph of seven convolutions. Young objects, and so most
    garbage, are looked at as before. Thresholds that others set meanwhile stay. torch 2.15 does the same for any
    backend; there this does nothing.
    """
    if hasattr(torch._dynamo.config, "gc_gen2_threshold_during_compile"):
        yield
        return
    with _Compiles.lock:
        if not _Compiles.count:
            young, middle, old = _Compiles.found = gc.get_threshold()
            _Compiles.set = (young, middle, max(old, _RARELY))
            gc.set_threshold(*_Compiles.set)
        _Compiles.count += 1
    try:
        yield
    finally:
        with _Compiles.lock:
            _Compiles.count -= 1
            if not _Compiles.count and gc.get_threshold() == _Compiles.set:
                gc.set_threshold(*_Compiles.found)
