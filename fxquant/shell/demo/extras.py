"""The demo's optional packages, imported when they are needed and named clearly when they are missing."""

from __future__ import annotations

from types import ModuleType

from fxquant.support import require as optional

PACKAGES = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
}


def require(module: str) -> ModuleType:
    """Import ``module`` or raise `MissingDependency` with the line that installs it.

    Example::

        >>> require("sklearn.datasets").load_digits().images.shape
        (1797, 8, 8)
    """
    top = module.partition(".")[0]
    package = PACKAGES.get(top, top)
    return optional.require(
        module,
        f'fxquant\'s demo needs {package}, which is not installed. Install it with: pip install "fxquant[demo]"',
    )


def require_all() -> None:
    """Check every package the demo uses before it trains, not minutes later."""
    for module in PACKAGES:
        require(module)
