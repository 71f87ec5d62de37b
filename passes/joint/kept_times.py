"""Measured seconds, kept on disk for all processes of machines that are alike."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from fxquant.targets.cpu import integer_dot_support


def folder() -> Path:
    """Where measurements are kept: ``fxquant/product_times`` under ``XDG_CACHE_HOME``, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxquant" / "product_times"


@functools.cache
def machine(device: str) -> str:
    """What a time depends on beside what is timed: the processor, its instructions, and torch."""
    if torch.device(device).type != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {instructions()}, torch {torch.__version__}"


@functools.cache
def instructions() -> str:
    """The processor's vector instructions, and whether dot products of 8-bit integers are among them.

    A part of cache keys: without these dot products some integer kernels saturate.
    """
    return f"{torch.backends.cpu.get_cpu_capability()} {'no ' if integer_dot_support() else ''}VNNI"


def kept(what: str, device: str, measure: Callable[[], list[float]]) -> list[float]:
    """What ``measure`` gave at the first call on a machine like this one: of several at once, the first to end counts.

    Where nothing can be written, or what is there cannot be read, it is measured in each process.
    """
    key = f"{machine(device)}: {what}"
    path = folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    found = _read(path, key)
    if found is not None:
        return found
    measured = measure()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps({"key": key, "seconds": measured}), encoding="utf-8")
        try:
            os.link(own, path)  # unlike a rename, not over another's
        finally:
            own.unlink()
    return _read(path, key) or measured


def _read(path: Path, key: str) -> list[float] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return list(known["seconds"]) if isinstance(known, dict) and known.get("key") == key else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
