"""Quantization-aware training as a torch.compile backend, exported to ONNX as integers.

>>> model = fxquant.prepare(model, (x,))
>>> step = torch.compile(model, backend="fxquant")
>>> loss(step(x), y).backward()  # and so on: train
>>> fxquant.export_onnx(model, (x,), "model.onnx")
>>> print(fxquant.verify_onnx(model, (x,), "model.onnx"))
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant import errors, ops, tensor_quant
    from fxquant.calibrate import calibrate
    from fxquant.onnx import export_onnx, verify_onnx
    from fxquant.override import override
    from fxquant.prepare import prepare, strip
    from fxquant.recipes import Recipe
    from fxquant.report import Mixed, explain
    from fxquant.report.cost import cost
    from fxquant.report.mixed import mixed
    from fxquant.report.sensitivity import sensitivity
    from fxquant.rules import Rule, first_layer, last_layer, skip
    from fxquant.spec import CurrentTensor, Fixed, MovingAverage, QuantSpec
    from fxquant.state import freeze_batch_norm, freeze_ranges, sync_ranges

__version__ = "0.1.0"

# Loaded at first use: `import fxquant` costs little more than `import torch`.
_HOMES = {
    **dict.fromkeys(("prepare", "strip"), "fxquant.prepare"),
    **dict.fromkeys(("freeze_batch_norm", "freeze_ranges", "sync_ranges"), "fxquant.state"),
    "calibrate": "fxquant.calibrate",
    "override": "fxquant.override",
    **dict.fromkeys(("Mixed", "cost", "explain", "mixed", "sensitivity"), "fxquant.report"),
    **dict.fromkeys(("export_onnx", "verify_onnx"), "fxquant.onnx"),
    **dict.fromkeys(("CurrentTensor", "Fixed", "MovingAverage", "QuantSpec"), "fxquant.spec"),
    "Recipe": "fxquant.recipes",
    **dict.fromkeys(("Rule", "first_layer", "last_layer", "skip"), "fxquant.rules"),
}
_MODULES = ("backend", "errors", "formats", "kernels", "onnx", "ops", "report", "tensor_quant")

__all__ = [
    "CurrentTensor",
    "Fixed",
    "Mixed",
    "MovingAverage",
    "QuantSpec",
    "Recipe",
    "Rule",
    "__version__",
    "calibrate",
    "cost",
    "errors",
    "explain",
    "export_onnx",
    "first_layer",
    "freeze_batch_norm",
    "freeze_ranges",
    "last_layer",
    "mixed",
    "ops",
    "override",
    "prepare",
    "sensitivity",
    "skip",
    "strip",
    "sync_ranges",
    "tensor_quant",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fxquant.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fxquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Keeps the function where a submodule has its name, whoever imports that submodule, and when."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
