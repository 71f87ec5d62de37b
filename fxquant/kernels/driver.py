"""Loads cubins and launches their kernels through CUDA's driver library, by ctypes.

Launches go to torch's current stream of the tensors' device, in the context that torch uses (the device's primary one),
so that they are ordered with torch's own kernels and CUDA graphs capture them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading

import torch

from fxquant.errors import KernelUnavailable
from fxquant.kernels.build import build
from fxquant.kernels.launch import THREADS

_log = logging.getLogger("fxquant.kernels")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _ask(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA must {what}: got {(text.value or b'an unknown error').decode()} ({status}).")


def _enter_context(device: int) -> None:
    """A thread that has not called CUDA's runtime yet, such as autograd's, has no context."""
    context = ctypes.c_void_p()
    _ask(_driver().cuCtxGetCurrent(ctypes.byref(context)), "name its context")
    if context.value is None:
        handle = ctypes.c_int()
        _ask(_driver().cuDeviceGet(ctypes.byref(handle), device), "find the device")
        _ask(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "give its context")
        _ask(_driver().cuCtxSetCurrent(context), "enter its context")


class CudaLauncher:
    """Compiles a family for a device when its first kernel is launched there, and keeps it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modules: dict[tuple[int, str, str], ctypes.c_void_p | KernelUnavailable] = {}
        self._kernels: dict[tuple[int, str], ctypes.c_void_p] = {}
        self.built: dict[str, str] = {}
        """Architecture → who compiled for it."""

    def processors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def prepare(self, family: str, dtype: str, device: torch.device) -> None:
        """Compiles and loads; raises KernelUnavailable, from then on at once."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(index):
            self._module(family, dtype, index)

    def launch(self, family: str, kernel: str, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(index):
            found = self._kernels.get((index, kernel)) or self._find(family, kernel, index)
            stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
            _enter_context(index)
            # An array with the address of each argument: here one struct, copied by the call.
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
            status = _driver().cuLaunchKernel(found, blocks, 1, 1, THREADS, 1, 1, 0, stream, pointers, None)
            _ask(status, f"launch {kernel}")

    def _find(self, family: str, kernel: str, index: int) -> ctypes.c_void_p:
        module = self._module(family, dtype_of(kernel), index)
        found = ctypes.c_void_p()
        _ask(_driver().cuModuleGetFunction(ctypes.byref(found), module, kernel.encode()), f"find {kernel}")
        self._kernels[index, kernel] = found
        return found

    def _module(self, family: str, dtype: str, index: int) -> ctypes.c_void_p:
        with self._lock:
            known = self._modules.get((index, family, dtype))
            if known is None:
                try:
                    known = self._load(family, dtype, index)
                except KernelUnavailable as error:
                    known = error
                self._modules[index, family, dtype] = known
        if isinstance(known, KernelUnavailable):
            raise known
        return known

    def _load(self, family: str, dtype: str, index: int) -> ctypes.c_void_p:
        if torch.version.hip:
            raise KernelUnavailable("The device must be NVIDIA's: got a ROCm build of torch. Aten computes the same.")
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
        cubin, compiler = build(family, dtype, architecture)
        module = ctypes.c_void_p()
        try:
            _enter_context(index)
            _ask(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"load {family}.cu as {compiler} compiled it")
        except (RuntimeError, OSError) as error:
            raise KernelUnavailable(
                f"{error} Take an NVRTC that is no newer than the driver; aten computes the same meanwhile."
            ) from error
        self.built[architecture] = compiler
        _log.info(
            "eager ops on CUDA tensors take our kernels: %s.cu for %s, %s, by %s", family, architecture, dtype, compiler
        )
        return module


def dtype_of(kernel: str) -> str:
    """The dtype in a kernel's name: ``"f16"`` of ``"ranged_f16_divide"``."""
    return next(part for part in kernel.split("_") if part in ("f32", "f16", "bf16"))
