"""The digest of fxquant's sources: compiled code made by other sources is never reused."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_SOURCES = (".py", ".cu", ".cuh")


@functools.cache
def source_digest() -> str:
    """Digest of torch's version and of every source file of the package, by its path and its bytes."""
    return digest_of(Path(__file__).parents[1])


def digest_of(package: Path) -> str:
    """The same of the package in another folder."""
    found = hashlib.sha256(torch.__version__.encode())
    for path in source_files(package):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def source_files(package: Path) -> Iterator[Path]:
    """Every source file of a package in order, through links too: ``fxquant/passes`` is one in a checkout."""
    for folder, folders, names in os.walk(package, followlinks=True):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(_SOURCES))
