"""The one door to the optional packages of the ONNX side: numpy, onnx, onnxscript, onnxruntime."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fxquant.errors import MissingDependency


def require(name: str, what: str = "ONNX export and verification") -> ModuleType:
    """The module ``name`` (dots allowed), imported now.

    Raises ``MissingDependency`` where its package is not installed; an installed package that fails to import
    for another reason raises its own error.
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingDependency(
            f'{package} must be installed for {what}: it is not. Run `pip install "fxquant[onnx]"`.'
        ) from error
