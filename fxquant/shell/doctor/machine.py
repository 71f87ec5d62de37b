"""What training stands on: Python, torch, a compiler, the processor, a GPU."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fxquant.errors import CompilerMissing
from fxquant.shell.doctor.checks import BROKEN, LEFT_OUT, MISSING, NOTE, OK, Check, Finding, in_range, is_there, pip
from fxquant.shell.failures import first_line

PYTHON = ("3.10", "3.13")  # the oldest that is supported, and the newest that was tried
TORCH = ("2.11", "2.15")


def checks(*, quick: bool) -> Iterator[Check]:
    """In the order in which one needs the other."""
    needs = ("torch",)
    compiler, cuda = functools.partial(_compiler, quick), functools.partial(_cuda, quick)
    yield Check(name="python", doing="reading Python's version", ask=_python)
    yield Check(name="torch", doing="importing torch", ask=_torch, mend=pip(f"torch>={TORCH[0]}"))
    yield Check(name="compiler", doing="compiling a kernel by Inductor", ask=compiler, mend=_a_compiler(), needs=needs)
    yield Check(name="cpu", doing="reading what the processor has", ask=_cpu)
    yield Check(name="cuda", doing="compiling kernels for the GPU", ask=cuda, needs=needs)
    yield Check(name="triton", doing="importing Triton", ask=_triton, mend=pip("triton"), needs=needs)


def _python() -> Finding:
    version = platform.python_version()
    told = f"{version} ({sys.executable})"
    return in_range(version, *PYTHON, f"Install Python {PYTHON[0]} to {PYTHON[1]}.") or Finding(status=OK, found=told)


def _torch() -> Finding:
    if not is_there("torch"):
        return Finding(status=BROKEN, found="not installed", fix=pip(f"torch>={TORCH[0]}"))
    import torch

    version = str(torch.__version__)
    return in_range(version, *TORCH, f'pip install --upgrade "torch>={TORCH[0]}"') or Finding(status=OK, found=version)


def _compiler(quick: bool) -> Finding:
    """Inductor's, which compiles a sum of two."""
    from fxquant.backend.inductor.require_compiler import cpp_compiler

    try:
        command = cpp_compiler()
    except CompilerMissing:
        return Finding(status=BROKEN, found="Inductor finds no C++ compiler for the CPU's kernels", fix=_a_compiler())
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    version = (said.strip().splitlines() or ["of no version"])[0]
    name = version if version.startswith(Path(command).name) else f"{command}, {version}"
    if quick:
        return Finding(status=OK, found=f"{name}; not tried")
    try:
        seconds = _compiled_on("cpu")
    except Exception as error:
        told = _said_by_compiler(error)
        fix = _a_compiler() if "Python.h" not in told else "Install Python's headers (apt install python3-dev)."
        return Finding(status=BROKEN, found=f"{name}; {told}", fix=fix)
    return Finding(status=OK, found=f"{name}; compiled a kernel in {seconds:.1f} s, which is right")


def _said_by_compiler(error: Exception) -> str:
    """The first error of the compiler's output, which torch quotes after the command; else the exception."""
    output = str(error).partition("\nOutput:\n")[2].splitlines()
    lines = [line.strip() for line in output if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else first_line(error))


def _a_compiler() -> str:
    what = {"Darwin": "xcode-select --install", "Windows": "Install the Build Tools of Visual Studio"}
    install = what.get(platform.system(), "Install g++ (apt install g++)")
    return f"{install}, or point CXX at one that works. Backend fxquant_eager needs none."


def _compiled_on(device: str) -> float:
    """Seconds of a compile of one line; of a size that no earlier one had, so that no cache has it."""
    import torch

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    start = time.perf_counter()
    x = torch.arange(1000 + time.time_ns() // 1000 % 90_000, dtype=torch.float32, device=device)
    if not torch.equal(torch.compile(twice, fullgraph=True, dynamic=False)(x), 2 * x):
        raise RuntimeError(f"a compiled x + x is not 2 * x on {device}")
    return time.perf_counter() - start


def _cpu() -> Finding:
    from fxquant.targets.cpu import cpu_name, integer_dot_support

    lacks = integer_dot_support()
    if lacks:
        return Finding(status=NOTE, found=f"{cpu_name()}. {lacks}")
    has = "has dot products of 8-bit integers, which make integer kernels fast"
    return Finding(status=OK, found=f"{cpu_name()}: {has}")


def _cuda(quick: bool) -> Finding:
    import torch

    from fxquant.kernels.dispatch import status

    if not torch.cuda.is_available():
        cpu = "On a CPU nothing is missing; a GPU needs a torch with CUDA"
        fix = f"{cpu}." if torch.version.cuda is None else f"{cpu}, and a driver: look at nvidia-smi."
        return Finding(status=MISSING, found=status(build=False).reason, fix=fix)
    index = torch.cuda.current_device()
    name = "{} ({}.{})".format(torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index))
    if quick:
        return Finding(status=OK, found=f"{name}, CUDA {torch.version.cuda}; not tried")
    found = status(build=True)
    if found.path != "cuda":
        told = f"{name}; eager operators take aten: {found.reason}"
        return Finding(status=NOTE, found=told, fix=pip("nvidia-cuda-nvrtc"))
    if not is_there("triton"):
        return Finding(status=OK, found=f"{name}; kernels of eager operators {found.reason}")
    seconds = _compiled_on("cuda")
    return Finding(status=OK, found=f"{name}; kernels {found.reason}; Inductor compiled one in {seconds:.1f} s")


def _triton() -> Finding:
    import torch

    wanted = torch.cuda.is_available()
    if not is_there("triton"):
        fix = pip("triton") if wanted else ""
        why = "backend 'fxquant' cannot train on CUDA" if wanted else "needed on CUDA alone"
        return Finding(status=MISSING, found=f"not installed: {why}", fix=fix)
    import triton

    version = str(triton.__version__)
    return Finding(status=OK, found=version) if wanted else Finding(status=LEFT_OUT, found=f"{version}; no GPU here")
