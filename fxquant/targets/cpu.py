"""What the CPU of this machine has for integer kernels."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from fxquant.targets.document import ModelPath

_DOTS = frozenset({"avx512_vnni", "avx_vnni"})


def integer_dot_support(cpuinfo: ModelPath = "/proc/cpuinfo") -> str | None:
    """``None`` when the CPU has dot products of 8-bit integers, else a sentence that says what is missing."""
    need = "integer kernels are faster than float ones only with 8-bit dot products"
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return f"Unknown CPU features, no {os.fspath(cpuinfo)} here: {need} (VNNI on x86, asimddp on Arm)."
    features = _features(lines)
    if "flags" in features:
        if features["flags"] & _DOTS:
            return None
        return (
            f"This CPU has neither avx512_vnni nor avx_vnni: {need}, and u8×s8 sums can saturate without, but for "
            "weights of 7 bits or fewer (QuantSpec(bits=7))."
        )
    if "Features" in features:
        return None if "asimddp" in features["Features"] else f"This CPU has no asimddp: {need}."
    return f"Unknown CPU features, {os.fspath(cpuinfo)} lists none: {need} (VNNI on x86, asimddp on Arm)."


def cpu_name(cpuinfo: ModelPath = "/proc/cpuinfo") -> str:
    """The CPU's model, as the system calls it."""
    name = platform.processor() or platform.machine() or "unknown CPU"
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return name
    words = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return words.get("model name", name)


def sums_saturate(cpuinfo: ModelPath = "/proc/cpuinfo") -> bool:
    """Whether this x86 CPU's fast kernels add two products of uint8 and int8 in 16 bits, which 255·127·2 exceeds."""
    try:
        flags = _features(Path(cpuinfo).read_text().splitlines()).get("flags")
    except OSError:
        return False
    return flags is not None and not flags & _DOTS


def integer_matrices(cpuinfo: ModelPath = "/proc/cpuinfo") -> bool:
    """Whether this x86 CPU multiplies matrices of 8-bit integers (AMX)."""
    try:
        return "amx_int8" in _features(Path(cpuinfo).read_text().splitlines()).get("flags", ())
    except OSError:
        return False


def _features(lines: list[str]) -> dict[str, set[str]]:
    return {k.strip(): set(v.split()) for k, _, v in (line.partition(":") for line in lines)}
