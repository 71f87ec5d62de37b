"""The one door to optional packages: imported when they are needed, named with their command where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxquant.errors import MissingDependency


def require(name: str, missing: str | None = None) -> ModuleType:
    """The module ``name`` (dots allowed), imported now.

    Raises ``MissingDependency`` where its package is not installed, which says ``missing``, or how to install the ONNX
    side; an installed package that fails to import for another reason raises its own error.
    """
    package = name.partition(".")[0]
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
