"""The one door to optional packages: imported when they are needed, named with their command where they are missing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from types import ModuleType

from fxquant.errors import MissingDependency

OLDEST = {"onnx": "1.19", "onnxscript": "0.6", "onnx_ir": "0.1.16"}  # as in pyproject.toml; older ones fail inside


def require(name: str, missing: str | None = None) -> ModuleType:
    """The module ``name`` (dots allowed), imported now.

    Raises ``MissingDependency`` where its package is not installed, which says ``missing``, or how to install the ONNX
    side, and where it is older than `OLDEST`; an installed package that fails to import for another reason raises its
    own error.
    """
    package = name.partition(".")[0]
    _refuse_older(package)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingDependency(
            missing
            or f"{package} must be installed for ONNX export and verification: it is not. "
            'Run `pip install "fxquant[onnx]"`.'
        ) from error


@functools.cache
def _refuse_older(package: str) -> None:
    oldest = OLDEST.get(package)
    try:
        version = importlib.metadata.version(package) if oldest else ""
    except importlib.metadata.PackageNotFoundError:
        return
    if oldest and _numbers(version) < _numbers(oldest):
        raise MissingDependency(
            f"{package} must be {oldest} or newer for ONNX export and verification: got {version}. "
            f'Run `pip install --upgrade "fxquant[onnx]" "{package}>={oldest}"`.'
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
