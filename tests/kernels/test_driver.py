"""The launcher of CUDA against a driver library that notes its calls: what is passed, in which order, how often."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxquant.errors import KernelUnavailable
from fxquant.kernels import driver
from fxquant.kernels.arguments import AffineArgs
from fxquant.kernels.driver import CudaLauncher
from fxquant.kernels.launch import THREADS

CUDA = torch.device("cuda", 1)
STREAM, CONTEXT, MODULE, FUNCTION = 0x5712, 0xC047, 0x40D, 0xF00


def value(argument: Any) -> Any:
    return argument.value if isinstance(argument, ctypes._SimpleCData) else argument


class Driver:
    """libcuda, as far as it is called. ``context``: whether this thread has one. ``fails``: function → status."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.context: int | None = CONTEXT
        self.fails: dict[str, int] = {}
        self.launched: list[tuple[Any, ...]] = []
        self.images: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.fails:
                return self.fails[name]
            getattr(self, f"on_{name}")(*arguments)
            return 0

        return call

    def on_cuCtxGetCurrent(self, found: Any) -> None:
        found._obj.value = self.context

    def on_cuDeviceGet(self, found: Any, index: int) -> None:
        found._obj.value = index + 40

    def on_cuDevicePrimaryCtxRetain(self, found: Any, device: ctypes.c_int) -> None:
        assert value(device) == CUDA.index + 40
        found._obj.value = CONTEXT

    def on_cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        self.context = value(context)

    def on_cuModuleLoadData(self, found: Any, image: bytes) -> None:
        self.images.append(image)
        found._obj.value = MODULE + len(self.images)

    def on_cuModuleGetFunction(self, found: Any, module: ctypes.c_void_p, name: bytes) -> None:
        assert value(module) > MODULE
        found._obj.value = FUNCTION + len(name)

    def on_cuGetErrorString(self, status: int, found: Any) -> None:
        found._obj.value = f"error {status} in words".encode()

    def on_cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        *numbers, stream, pointers, extra = rest
        struct = AffineArgs.from_address(pointers[0])
        self.launched.append((value(function), tuple(numbers), value(stream), struct.count, struct.quant_max, extra))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: found)
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Any:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM + index))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(driver, "build", lambda *what: (repr(what).encode(), "NVRTC 13.0"))
    found.entered = entered
    return found


def launch(launcher: CudaLauncher, kernel: str = "quantize_f16_divide_tensor", device: torch.device = CUDA) -> None:
    launcher.launch("affine", kernel, 7, AffineArgs(count=2**40 + 3, quant_max=127), device)


def test_what_a_launch_passes(library: Driver) -> None:
    launch(CudaLauncher())
    function = FUNCTION + len("quantize_f16_divide_tensor")
    assert library.launched == [(function, (7, 1, 1, THREADS, 1, 1, 0), STREAM + 1, 2**40 + 3, 127.0, None)]
    assert library.images == [b"('affine', 'f16', 'sm_90')"]
    assert set(library.entered) == {1}


def test_a_family_is_built_once_a_dtype_and_device(library: Driver, caplog: pytest.LogCaptureFixture) -> None:
    launcher = CudaLauncher()
    with caplog.at_level("INFO", "fxquant.kernels"):
        for _ in range(2):
            launch(launcher)
            launch(launcher, "backward_f16_divide_tensor")
    said = "eager ops on CUDA tensors take our kernels: affine.cu for sm_90, f16, by NVRTC 13.0"
    assert caplog.messages == [said]
    assert len(library.images) == 1 and library.calls.count("cuModuleGetFunction") == 2
    launch(launcher, "masked_backward_bf16")
    launch(launcher, device=torch.device("cuda", 0))
    assert len(library.images) == 3 and len(library.launched) == 6
    assert launcher.built == {"sm_90": "NVRTC 13.0"} and launcher.processors(CUDA) == 132


def test_a_device_without_number_is_the_current_one(library: Driver) -> None:
    launch(CudaLauncher(), device=torch.device("cuda"))
    assert library.launched[0][2] == STREAM + 1


def test_a_thread_without_context_enters_that_of_torch(library: Driver) -> None:
    """As autograd's threads may be."""
    launcher = CudaLauncher()
    launch(launcher)
    assert "cuCtxSetCurrent" not in library.calls
    library.context = None
    launch(launcher)
    assert library.context == CONTEXT
    assert library.calls[-5:] == [
        *("cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLaunchKernel"),
    ]


def test_a_failed_launch_says_what_cuda_said(library: Driver) -> None:
    library.fails["cuLaunchKernel"] = 719
    message = r"CUDA must launch quantize_f16_divide_tensor: got error 719 in words \(719\)"
    with pytest.raises(RuntimeError, match=message):
        launch(CudaLauncher())


def test_a_cubin_that_cannot_be_loaded_is_no_kernel(library: Driver) -> None:
    library.fails["cuModuleLoadData"] = 222
    launcher = CudaLauncher()
    message = r"CUDA must load affine\.cu as NVRTC 13\.0 compiled it: got error 222 .* no newer than the driver"
    for _ in range(2):  # the second time at once
        with pytest.raises(KernelUnavailable, match=message):
            launch(launcher)
    assert library.calls.count("cuModuleLoadData") == 1 and not launcher.built


def test_a_failed_build_is_remembered(library: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[tuple[str, ...]] = []

    def refuse(*what: str) -> Any:
        tries.append(what)
        raise KernelUnavailable("no compiler")

    monkeypatch.setattr(driver, "build", refuse)
    launcher = CudaLauncher()
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match="no compiler"):
            launcher.prepare("floating", "f32", CUDA)
    assert tries == [("floating", "f32", "sm_90")]


def test_rocm_has_no_kernels(library: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(KernelUnavailable, match=r"must be NVIDIA's: got a ROCm build of torch\. Aten computes"):
        launch(CudaLauncher())


def test_the_driver_library_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", opened.append)
    for platform in ("linux", "win32"):
        driver._driver.cache_clear()
        monkeypatch.setattr(driver.sys, "platform", platform)
        driver._driver()
    driver._driver.cache_clear()
    assert opened == ["libcuda.so.1", "nvcuda.dll"]
