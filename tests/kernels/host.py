"""The CUDA sources compiled by the machine's C++ compiler, and a launcher that runs their kernels on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.build import SOURCES

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
# The warning is about `#pragma unroll`, which the host does not know.
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]


def compile_library(source: Path, folder: Path, *extra: str) -> ctypes.CDLL:
    """``source`` as a shared library, opened; a failure shows what the compiler said."""
    out = folder / f"{source.stem}.so"
    command = [str(COMPILER), *FLAGS, *extra, f"-I{SOURCES}", str(source), "-o", str(out), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


class HostLauncher:
    """Runs a kernel of the libraries by name, all threads of its grid one after the other.

    ``blocks_at_most`` makes grids so small that threads go round; ``launched`` lists what ran.
    """

    def __init__(self, libraries: dict[str, ctypes.CDLL], blocks_at_most: int = 4, threads: int = 32) -> None:
        self.libraries, self.blocks_at_most, self.threads = libraries, blocks_at_most, threads
        self.launched: list[tuple[str, str, int]] = []

    def processors(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return 2

    def launch(self, family: str, kernel: str, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        self.launched.append((family, kernel, blocks))
        # The range of a block has its place by the number of blocks, so those grids stay as they are.
        blocks = blocks if kernel.startswith("ranged") else min(blocks, self.blocks_at_most)
        found: Any = getattr(self.libraries[family], kernel)
        found(ctypes.byref(arguments), ctypes.c_int64(blocks), ctypes.c_int64(self.threads))


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    """Dtype, shape and every bit; one NaN is as good as another."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if found.dtype.is_floating_point and found.element_size() > 1:
        nan = wanted.isnan()
        assert torch.equal(found.isnan(), nan)
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
        found, wanted = (tensor.contiguous().view(integers).masked_fill(nan, 0) for tensor in (found, wanted))
    elif found.dtype.is_floating_point:
        found, wanted = found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
    differ = (found != wanted).sum().item()
    assert not differ, f"{differ} of {found.numel()} differ, first at {(found != wanted).nonzero()[0].tolist()}"


def special_values() -> Tensor:
    """Zeros, subnormals, halves and their neighbours, ends of ranges, large, infinite, NaN; of both signs."""
    magnitudes = [0.0, 2.0**-149, 1e-40, 2.0**-126, 2.0**-24, 0.25, 0.5, 1.0, 1.5, 2.5, 3.5, 5.0, 6.0, 7.5, 28.0]
    magnitudes += [126.5, 127.5, 128.0, 128.5, 254.5, 255.5, 240.0, 447.0, 448.0, 464.0, 480.0, 57344.0, 61440.0]
    magnitudes += [65504.0, 65519.9, 65520.0, 2.0**23 + 1, 2.0**24, 2.0**31, 2.0**62, 2.0**63, 1e30, 3.4e38]
    finite = torch.tensor(magnitudes)
    near = torch.cat([finite, torch.nextafter(finite, torch.tensor(0.0)), torch.nextafter(finite, torch.tensor(9e38))])
    ends = torch.tensor([float("inf"), float("nan")])
    return torch.cat([near, ends, -near, -ends])


def random_bits(count: int, seed: int) -> Tensor:
    """Float32 of uniformly random bit patterns: every exponent as often as any other, NaN and inf among them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64, generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )
