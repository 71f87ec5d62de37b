"""Compiles ``cuda/*.cu`` to a cubin for one architecture: by NVRTC, which comes with torch's CUDA builds, or by nvcc.

Both are reached through their public interfaces (NVRTC's C library by ctypes; the nvcc command), nothing of torch but
``torch.version.cuda``. The sources include no header of anybody else. A cubin is kept on disk under the digest of all
that it follows from: sources, flags, compiler and architecture.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fxquant.errors import KernelUnavailable

SOURCES = Path(__file__).resolve().parent / "cuda"
FAMILIES = ("affine", "floating", "amax")
# Every operation that rounds is an intrinsic already; these hold for what a later edit forgets.
FLAGS = ("--fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
_CACHE = "FXQUANT_CACHE_DIR"
_log = logging.getLogger("fxquant.kernels")


class Compiler(NamedTuple):
    """A way to a cubin: its name with version, and a function of (family, flags), which raises RuntimeError."""

    name: str
    cubin: Callable[[str, tuple[str, ...]], bytes]


def flags_for(architecture: str, dtype: str) -> tuple[str, ...]:
    """Flags of one build, such as ``flags_for("sm_90", "f16")``; the same for both compilers."""
    return (f"-arch={architecture}", f"-DFXQ_{dtype.upper()}", "-std=c++17", *FLAGS)


def digest(family: str, flags: tuple[str, ...], compiler: str) -> str:
    """Of everything that a cubin follows from."""
    found = hashlib.sha256("\0".join((family, *flags, compiler)).encode())
    for path in sorted(SOURCES.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:24]


def cache_folder() -> Path:
    """``$FXQUANT_CACHE_DIR``, or ``fxquant`` in the user's cache folder."""
    if named := os.environ.get(_CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def build(family: str, dtype: str, architecture: str) -> tuple[bytes, str]:
    """The cubin of one family for one dtype, and who compiled it.

    Raises KernelUnavailable with what each compiler had to say where none could.
    """
    flags, refusals = flags_for(architecture, dtype), []
    for find in (nvrtc, nvcc):
        try:
            compiler = find()
            return _cached(family, flags, compiler), compiler.name
        except (RuntimeError, OSError) as error:
            refusals.append(f"{find.__name__}: {error}")
    raise KernelUnavailable(
        f"`{family}.cu` must compile for {architecture}: {'; '.join(refusals)}. Install NVRTC of your torch's CUDA "
        f"(pip install nvidia-cuda-nvrtc) or put nvcc on PATH; aten computes the same meanwhile."
    )


def _cached(family: str, flags: tuple[str, ...], compiler: Compiler) -> bytes:
    path = cache_folder() / f"{family}-{digest(family, flags, compiler.name)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = compiler.cubin(family, flags)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # whole or not at all, whoever else compiles the same
    except OSError as error:
        _log.info("compiled kernels are not kept, as %s cannot be written: %s", path.parent, error)
    return cubin


def nvcc() -> Compiler:
    """The command, from PATH or CUDA_HOME. RuntimeError where there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    command = next((place for place in places if os.path.exists(place)), None) or shutil.which("nvcc")
    if command is None:
        raise RuntimeError("it is neither on PATH nor in CUDA_HOME")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.split()
    return Compiler(f"nvcc {version[-1] if version else ''}".strip(), functools.partial(_run_nvcc, command))


def _run_nvcc(command: str, family: str, flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.cubin")
        full = [command, "-cubin", *flags, "-Werror", "all-warnings", str(SOURCES / f"{family}.cu"), "-o", out]
        done = subprocess.run(full, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}")
        return Path(out).read_bytes()


@functools.cache
def nvrtc() -> Compiler:
    """The library, as torch loads it or as pip installs it. OSError where there is none."""
    library = _open_nvrtc()
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return Compiler(f"NVRTC {major.value}.{minor.value}", functools.partial(_run_nvrtc, library))


def _open_nvrtc() -> ctypes.CDLL:
    # A cubin runs on drivers of its own CUDA major: torch's, whose driver is there.
    major = (torch.version.cuda or "13").split(".")[0]
    names = [f"nvrtc64_{major}0_0.dll"] if sys.platform == "win32" else [f"libnvrtc.so.{major}"]
    for folder in sys.path:
        root = Path(folder) / "nvidia"
        names += map(str, sorted(root.glob(f"*/*/{names[0]}"))) if root.is_dir() else ()
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"no {names[0]} is found, neither loaded by torch nor installed in site-packages/nvidia")


def _run_nvrtc(library: ctypes.CDLL, family: str, flags: tuple[str, ...]) -> bytes:
    source, program = (SOURCES / f"{family}.cu").read_bytes(), ctypes.c_void_p()
    _ask(library, library.nvrtcCreateProgram(ctypes.byref(program), source, f"{family}.cu".encode(), 0, None, None))
    try:
        options = [flag.encode() for flag in (*flags, f"-I{SOURCES}")]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if status:
            raise RuntimeError(log or library.nvrtcGetErrorString(status).decode())
        if log:
            _log.warning("NVRTC on %s.cu: %s", family, log)
        return _read(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _ask(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _ask(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _ask(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RuntimeError(library.nvrtcGetErrorString(status).decode())
