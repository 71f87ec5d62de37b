"""Which path eager ops on CUDA tensors take, and what is said about it; other launchers stand for CUDA's."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
import fxquant.ops.amax
from fxquant import kernels, ops
from fxquant.errors import InvalidArgument, KernelUnavailable
from fxquant.kernels import dispatch
from fxquant.kernels.driver import dtype_of
from fxquant.ops import library
from fxquant.ops.lowering_table import KERNELS
from tests.kernels.host import HostLauncher, assert_same_bits

X = torch.linspace(-2, 2, 64).view(4, 16)
NUMBERS = (X, 0.1, 0, -8, 7)
NAME = "fake_quantize_per_tensor_affine"


class Refusing:
    """A launcher whose compilers all fail."""

    built: dict[str, str]

    def __init__(self) -> None:
        self.built, self.tries = {}, 0

    def prepare(self, family: str, dtype: str, device: torch.device) -> None:
        self.tries += 1
        raise KernelUnavailable("`affine.cu` must compile for sm_90: nvcc: it is neither here nor there.")

    def processors(self, device: torch.device) -> int:
        return 1

    def launch(self, family: str, *_: Any) -> None:
        self.prepare(family, "f32", torch.device("cpu"))


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> dispatch._State:
    """What is decided here is forgotten afterwards."""
    found = dispatch._State()
    monkeypatch.setattr(dispatch, "_state", found)
    return found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, as far as the decision looks at one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def aten(*args: Any, **kwargs: Any) -> str:
    return "aten"


def test_the_library_and_the_entries_name_the_same_ops() -> None:
    assert set(dispatch.ENTRIES) == KERNELS
    for name in KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxquant::{name}", "CUDA"), name


def test_other_ops_have_one_kernel_for_all_devices() -> None:
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fxquant::dequantize_per_tensor", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_status_says_so() -> None:
    found = kernels.status()
    assert found.path == "aten"
    assert "CUDA" in found.reason and torch.__version__ in found.reason
    assert str(found) == f"eager ops on CUDA tensors take aten: {found.reason}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_cuda_is_refused() -> None:
    message = '`path` must be "auto" or "aten" here: got \'cuda\', but torch'
    with pytest.raises(KernelUnavailable, match=message), kernels.using("cuda"):
        pytest.fail("the body ran")
    assert not dispatch.asked_for()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_no_launcher() -> None:
    with pytest.raises(KernelUnavailable, match="torch"):
        kernels.launcher()


def test_another_path_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"`path` must be one of .*: got 'triton'"), kernels.using("triton"):
        pytest.fail("the body ran")


def test_using_is_undone_by_an_error_too() -> None:
    with kernels.using("aten"):
        assert kernels.status().reason == 'asked for by using("aten")'
        with pytest.raises(ZeroDivisionError), kernels.using("auto"):
            assert not dispatch.asked_for()
            raise ZeroDivisionError
        assert dispatch.asked_for()
    assert not dispatch.asked_for()


def test_a_kernel_is_taken(state: Any, launcher: HostLauncher) -> None:
    state.launcher = launcher
    found = dispatch.take(NAME, aten, NUMBERS, {"rounding": "divide"})
    assert_same_bits(found, ops.fake_quantize_per_tensor_affine(*NUMBERS, rounding="divide"))
    assert [name for _, name, _ in launcher.launched] == ["fake_quantize_f32_divide_tensor"]


def test_using_aten_takes_no_kernel(state: Any, launcher: HostLauncher) -> None:
    state.launcher = launcher
    with kernels.using("aten"):
        assert dispatch.take(NAME, aten, NUMBERS, {}) == "aten"
    assert not launcher.launched


def test_a_call_that_no_kernel_serves_is_logged_once(
    state: Any, launcher: HostLauncher, caplog: pytest.LogCaptureFixture, card: None
) -> None:
    state.launcher, launcher.built = launcher, {"sm_90": "NVRTC 13.0"}  # type: ignore[attr-defined]
    wide = (X.double(), *NUMBERS[1:])
    with caplog.at_level(logging.DEBUG, "fxquant.kernels"):
        for path in ("auto", "auto"):
            with kernels.using(path):
                assert dispatch.take(NAME, aten, wide, {}) == "aten"
    why = f"{NAME}: kernels read torch.float32, torch.float16, torch.bfloat16, and this is torch.float64"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("DEBUG", f"aten computes {why}")]
    found = kernels.status(build=False)
    assert (found.path, found.reason, found.declined) == ("cuda", "compiled by NVRTC 13.0 for sm_90", (why,))
    assert str(found).endswith(f"\n  but aten for {why}")


def test_a_failed_build_warns_once_and_is_not_tried_again(
    state: Any, caplog: pytest.LogCaptureFixture, card: None
) -> None:
    state.launcher = refusing = Refusing()
    for _ in range(3):
        assert dispatch.take(NAME, aten, NUMBERS, {}) == "aten"
    assert refusing.tries == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "eager ops on CUDA tensors take aten: `affine.cu` must compile for sm_90" in caplog.text
    found = kernels.status()
    assert found.path == "aten" and found.reason.startswith("`affine.cu` must compile for sm_90: nvcc: it is neither")
    assert refusing.tries == 1


def test_status_builds_to_find_out(state: Any, caplog: pytest.LogCaptureFixture, card: None) -> None:
    state.launcher = refusing = Refusing()
    assert kernels.status(build=False).reason == "compiled at first use"
    assert kernels.status().path == "aten" and refusing.tries == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_asking_for_cuda_raises_what_the_compilers_said(state: Any, card: None) -> None:
    state.launcher = Refusing()
    with pytest.raises(KernelUnavailable, match="must compile for sm_90"), kernels.using("cuda"):
        pytest.fail("the body ran")
    state.asked = "cuda"  # a family that fails later
    with pytest.raises(KernelUnavailable, match="must compile for sm_90"):
        dispatch.take(NAME, aten, NUMBERS, {})


def test_a_warm_import_loads_no_kernels() -> None:
    code = "import sys, torch, fxquant.ops as o; o.fake_quantize_per_tensor_affine(torch.ones(2), 0.1, 0, 0, 7)"
    code += "; print('fxquant.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kernel", ["fake_quantize_f32_divide_tensor", "blocks_f16", "masked_backward_bf16"])
def test_the_dtype_stands_in_the_name(kernel: str) -> None:
    assert dtype_of(kernel) in ("f32", "f16", "bf16") and f"_{dtype_of(kernel)}" in kernel


@pytest.fixture
def on_cpu(state: Any, launcher: HostLauncher) -> Iterator[HostLauncher]:
    """CPU tensors dispatched as CUDA tensors are, by the same function under the same kind of key."""
    state.launcher = launcher
    with torch.library._scoped_library("fxquant", "IMPL") as temporary:
        for name in KERNELS:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.fxquant, packet), overload or "default")
            temporary.impl(name, library._by_dispatch(name, library.ARITHMETIC[op]), "CPU")
        yield launcher


def test_through_the_dispatcher(on_cpu: HostLauncher) -> None:
    """Defaults and keyword-only arguments as torch hands them on."""
    found = ops.fake_quantize_per_tensor_affine(*NUMBERS)
    ops.fake_quantize_mx(X, {-1: 16})
    ops.fake_quantize_nvfp4(X)
    ops.quantize_per_tensor(*NUMBERS)
    ops.fake_quantize_float(X)
    ops.quantize_float(X, 0.5)
    ops.fake_quantize_blocks(X, {-1: 16}, 4)
    names = [name for _, name, _ in on_cpu.launched]
    assert names == [
        "fake_quantize_f32_reciprocal_tensor",
        "blocks_f32",
        "blocks_f32",
        "quantize_f32_divide_tensor",
        "fake_quantize_float_f32_tensor",
        "quantize_float_f32_tensor",
        "blocks_f32",
    ]
    assert_same_bits(found, library.ARITHMETIC[ops.fake_quantize.PER_TENSOR_SCALAR](*NUMBERS))


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_run_on_kernels(on_cpu: HostLauncher, axis: int | None) -> None:
    x = X.clone().requires_grad_()
    count = 1 if axis is None else 4
    scale, point = torch.full((count,), 0.1), torch.zeros(count, dtype=torch.int32)
    if axis is None:
        y = ops.fake_quantize_per_tensor_affine(x, scale, point, -8, 7)
    else:
        y = ops.fake_quantize_per_channel_affine(x, scale, point, axis, -8, 7)
    y.square().sum().backward()
    assert [name.split("_f32")[0] for _, name, _ in on_cpu.launched] == ["fake_quantize", "backward"]
    inside = ((X / 0.1).round() >= -8) & ((X / 0.1).round() <= 7)
    assert isinstance(x.grad, Tensor) and torch.equal(x.grad, 2 * y.detach() * inside)


def test_errors_are_those_of_the_checks(on_cpu: HostLauncher) -> None:
    """What a kernel declines goes to aten, whose checks are the operator's."""
    with pytest.raises(RuntimeError, match="`zero_point` must be between `quant_min` and `quant_max`: got 9"):
        ops.fake_quantize_per_tensor_affine(X, 0.1, 9, -8, 7)
    with pytest.raises(NotImplementedError, match="`input` must be a floating-point tensor"):
        ops.fake_quantize_per_tensor_affine(X.int(), 0.1, 0, -8, 7)
    assert not on_cpu.launched


def test_vmap_reaches_kernels(on_cpu: HostLauncher) -> None:
    found = torch.vmap(lambda row: ops.fake_quantize_per_tensor_affine(row, 0.1, 0, -8, 7))(X)
    assert len(on_cpu.launched) == 1
    assert_same_bits(found, library.ARITHMETIC[ops.fake_quantize.PER_TENSOR_SCALAR](*NUMBERS))


def test_compiled_graphs_take_no_kernel(on_cpu: HostLauncher) -> None:
    """They hold the decomposition: Triton on CUDA, C++ here."""

    def step(x: Tensor) -> Tensor:
        return ops.fake_quantize_mx(x, {-1: 16}) + ops.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7)

    torch._dynamo.reset()
    found = torch.compile(step, backend="inductor")(X)
    assert not on_cpu.launched
    assert_same_bits(found, step(X))
    assert len(on_cpu.launched) == 2


def test_explain_says_which_path_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fxquant.prepare(torch.nn.Sequential(torch.nn.Linear(8, 8)), (torch.ones(2, 8),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = fxquant.explain(model)
    line = "eager ops on CUDA tensors take cuda: compiled at first use"
    assert found.eager_cuda == line == found.to_dict()["eager_cuda"] and str(found).endswith("\n" + line)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fxquant.explain(model).eager_cuda is None
    with kernels.using("aten"):
        assert 'take aten: asked for by using("aten")' in str(fxquant.explain(model))


def test_it_is_public() -> None:
    assert fxquant.kernels is kernels and set(kernels.__all__) == {"KernelStatus", "launcher", "status", "using"}
