"""What eager ops on CUDA tensors run on, as `fxquant.kernels` says and as the profiler sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant import kernels, ops
from fxquant.errors import KernelUnavailable
from tests.gpu.harness import assert_same_bits

QPARAMS = (0, 255)
OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "per tensor": lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, s, z, *QPARAMS),
    "codes": lambda x, s, z: ops.quantize_per_tensor(x, s, z, *QPARAMS, torch.uint8),
    "e4m3": lambda x, s, z: ops.fake_quantize_float(x, s.view(()), "e4m3"),
    "mx": lambda x, s, z: ops.fake_quantize_mx(x, {-1: 32}, "e2m1"),
}


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    return x.to(device), torch.tensor([0.03]).to(device), torch.tensor([4], dtype=torch.int32).to(device)


def launched(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call runs."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == cuda and "Mem" not in event.name]


def test_here_our_kernels_are_built(cuda: str) -> None:
    OPS["per tensor"](*inputs(cuda))
    found = kernels.status()
    assert found.path == "cuda", found.reason


@pytest.mark.parametrize("name", OPS)
def test_our_path_is_one_kernel_and_aten_s_is_aten_s(name: str, cuda: str) -> None:
    args = inputs(cuda)
    with kernels.using("cuda"):
        ours = launched(lambda: OPS[name](*args))
    with kernels.using("aten"):
        atens = launched(lambda: OPS[name](*args))
    assert len(ours) == 1 and "at::native" not in ours[0]
    assert len(atens) > 1 and all("at::native" in each for each in atens)


@pytest.mark.parametrize("name", OPS)
def test_paths_give_the_same_bits(name: str, device: str) -> None:
    args = inputs(device)
    expected = OPS[name](*inputs("cpu"))
    for path in ("aten", "auto"):
        with kernels.using(path):
            assert kernels.status().path == "aten" or path == "auto"
            assert_same_bits(OPS[name](*args).cpu(), expected)


def test_the_path_is_what_it_was_behind_the_block(device: str) -> None:
    before = kernels.status()
    with pytest.raises(ZeroDivisionError), kernels.using("aten"):
        assert kernels.status().path == "aten"
        1 / 0  # noqa: B018
    assert kernels.status() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_our_path_is_an_error_with_its_reason() -> None:
    with pytest.raises(KernelUnavailable, match=r"CUDA"), kernels.using("cuda"):
        pass
    assert kernels.status().path == "aten"


def test_a_compiled_graph_reaches_no_kernel_of_ours(cuda: str) -> None:
    args = inputs(cuda)
    compiled = torch.compile(OPS["per tensor"], fullgraph=True)
    with kernels.using("cuda"):
        names = launched(lambda: compiled(*args))
    assert len(names) == 1 and names[0].startswith("triton_")
