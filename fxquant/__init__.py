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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant import errors, ops, ptq, tensor_quant
    from fxquant.onnx import export_onnx, tune_onnx, verify_onnx
    from fxquant.prepared.convert import convert
    from fxquant.prepared.freeze import freeze_batch_norm, freeze_ranges
    from fxquant.prepared.optimizers import parameter_groups
    from fxquant.prepared.override import override
    from fxquant.prepared.prepare import prepare, strip
    from fxquant.prepared.program import export_program
    from fxquant.prepared.sync_ranges import sync_ranges
    from fxquant.probe.calibrate import calibrate
    from fxquant.report import Mixed, explain
    from fxquant.report.cost import cost
    from fxquant.search.mixed import mixed
    from fxquant.search.sensitivity import sensitivity
    from fxquant.spec.quant_spec import QuantSpec
    from fxquant.spec.ranges import CurrentTensor, Fixed, Learned, MovingAverage
    from fxquant.spec.recipes import Recipe
    from fxquant.spec.rules import Rule, first_layer, last_layer, skip
    from fxquant.training import distill
    from fxquant.training.batch_norm import reestimate_batch_norm
    from fxquant.training.schedule import Schedule
    from fxquant.training.stage import Stage

__version__ = "0.1.0"

# Loaded at first use: `import fxquant` costs little more than `import torch`.
_HOMES = {
    **dict.fromkeys(("prepare", "strip"), "fxquant.prepared.prepare"),
    **dict.fromkeys(("freeze_batch_norm", "freeze_ranges"), "fxquant.prepared.freeze"),
    "convert": "fxquant.prepared.convert",
    "export_program": "fxquant.prepared.program",
    "sync_ranges": "fxquant.prepared.sync_ranges",
    "override": "fxquant.prepared.override",
    "parameter_groups": "fxquant.prepared.optimizers",
    "calibrate": "fxquant.probe.calibrate",
    **dict.fromkeys(("Mixed", "mixed", "sensitivity"), "fxquant.search"),
    **dict.fromkeys(("cost", "explain"), "fxquant.report"),
    **dict.fromkeys(("export_onnx", "tune_onnx", "verify_onnx"), "fxquant.onnx"),
    **dict.fromkeys(("CurrentTensor", "Fixed", "Learned", "MovingAverage", "QuantSpec", "Recipe"), "fxquant.spec"),
    "distill": "fxquant.training",
    "Schedule": "fxquant.training.schedule",
    "Stage": "fxquant.training.stage",
    "reestimate_batch_norm": "fxquant.training.batch_norm",
    **dict.fromkeys(("Rule", "first_layer", "last_layer", "skip"), "fxquant.spec"),
}
_MODULES = ("backend", "errors", "kernels", "onnx", "ops", "plan", "ptq", "report", "spec", "tensor_quant")
_FORMER = ("formats", "profiles", "recipes", "rules", "state")
# Modules that had another name in version 0.1, and checkpoints of whole models that name them, load from there.
__path__.append(str(Path(__file__).parent / "formerly"))

__all__ = [
    "CurrentTensor",
    "Fixed",
    "Learned",
    "Mixed",
    "MovingAverage",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Schedule",
    "Stage",
    "__version__",
    "calibrate",
    "convert",
    "cost",
    "distill",
    "errors",
    "explain",
    "export_onnx",
    "export_program",
    "first_layer",
    "freeze_batch_norm",
    "freeze_ranges",
    "last_layer",
    "mixed",
    "ops",
    "override",
    "parameter_groups",
    "prepare",
    "ptq",
    "reestimate_batch_norm",
    "sensitivity",
    "skip",
    "strip",
    "sync_ranges",
    "tensor_quant",
    "tune_onnx",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name in (*_MODULES, *_FORMER):
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
        if isinstance(value, types.ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
