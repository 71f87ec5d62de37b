"""Running an exported model in OpenVINO on the CPU: its outputs, and in which precision its products run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxquant.errors import ExportError, MissingDependency
from fxquant.targets.document import ModelPath, all_nodes, load_model
from fxquant.targets.kernels import WEIGHTED, KernelRow
from fxquant.targets.session import Feeds

if TYPE_CHECKING:
    import numpy as np


_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FUSED = "Subgraph"  # attention in one kernel
_INTEGER = frozenset({"i8", "u8", "i4", "u4"})


@dataclass(frozen=True, kw_only=True)
class OpenVinoRun:
    """What OpenVINO made of a file: its version, its products, its outputs in the graph's order."""

    version: str
    rows: tuple[KernelRow, ...]
    outputs: list[np.ndarray]


def require_openvino() -> Any:
    """The openvino module; MissingDependency where it is not installed."""
    try:
        return import_module("openvino")
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise MissingDependency(
            "openvino must be installed to verify a model for target 'openvino': it is not. "
            'Run `pip install "fxquant[openvino]"`.'
        ) from error


def run_openvino(path: ModelPath, feeds: Feeds) -> OpenVinoRun:
    """Compiles the file for the CPU, with float32 wherever it does not ask for integers, and runs it.

    Raises ExportError where the file does not load or run, MissingDependency without openvino.
    """
    openvino = require_openvino()
    try:
        hint = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the CPU has it
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", hint)
        found = compiled(dict(feeds))
    except Exception as error:  # OpenVINO raises RuntimeError and its subclasses, with all detail in the text
        version = openvino.__version__
        raise ExportError(f"{os.fspath(path)} must load and run in OpenVINO {version}: got {error}") from error
    return OpenVinoRun(
        version=str(openvino.__version__).partition("-")[0],
        rows=tuple(_rows(compiled.get_runtime_model().get_ordered_ops(), path)),
        outputs=[found[output] for output in compiled.outputs],
    )


def _rows(operations: list[Any], path: ModelPath) -> Iterator[KernelRow]:
    """A row per product of the runtime graph, and one per attention that became a single kernel.

    OpenVINO keeps most names of the file's nodes, but not all: where it lost them, the row has OpenVINO's own.
    """
    exported = {node.name: node.op_type for node in all_nodes(load_model(path).graph) if node.op_type in WEIGHTED}
    for operation in operations:
        info = {key: operation.get_rt_info()[key].astype(str) for key in _INFO}
        layer, precision = info["layerType"], info["runtimePrecision"]
        tokens = info["originalLayersNames"].split(",")  # OpenVINO adds "/DequantizationMultiply" and its like
        names = [name for name in exported if any(t == name or t.startswith(f"{name}/") for t in tokens)]
        # What rescales a product's result, fused with what reads it, bears the product's name with a suffix.
        if layer not in _PRODUCTS and not (layer == _FUSED and set(names) & set(tokens)):
            continue
        read = [_type_name(port) for port in operation.inputs()]
        weight_only = layer in _PRODUCTS and precision in _INTEGER and read[0] not in _INTEGER
        integer = not weight_only and (precision in _INTEGER if layer in _PRODUCTS else _reads_integers(read))
        yield KernelRow(
            name=", ".join(names) or operation.get_friendly_name(),
            op_type=", ".join(exported[name] for name in names) or layer,
            kernel=f"{layer} {precision}",
            integer=integer,
            reason=_WEIGHT_ONLY.format(*read)
            if weight_only
            else _FLOAT.format(", ".join(read))
            if not integer
            else None,
        )


_FLOAT = "OpenVINO runs it on {}"

# Its CPU plugin may do so in groups unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0; seen with 8-bit weights.
_WEIGHT_ONLY = "weight-only: {1} codes on {0} activations, which OpenVINO may round to 8 bits as it runs"
_INFO = ("layerType", "runtimePrecision", "originalLayersNames")


def _type_name(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _reads_integers(read: list[str]) -> bool:
    """Of a fused attention: query, key and value are integers; what else it reads is a mask."""
    integers = [name for name in read if name in _INTEGER]
    return len(integers) >= min(3, len(read))
