"""In which precision OpenVINO runs the products of an exported model: read from the graph that it compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxquant.targets.document import ModelPath, all_nodes, load_model
from fxquant.targets.target import WEIGHTED, KernelRow

_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FUSED = "Subgraph"  # attention in one kernel
_INTEGER = frozenset({"i8", "u8", "i4", "u4"})
_FLOAT = "OpenVINO runs it on {}"

# Its CPU plugin may do so in groups unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0; seen with 8-bit weights.
_WEIGHT_ONLY = "weight-only: {1} codes on {0} activations, which OpenVINO may round to 8 bits as it runs"
_INFO = ("layerType", "runtimePrecision", "originalLayersNames")


def kernel_rows(operations: list[Any], path: ModelPath) -> Iterator[KernelRow]:
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


def _type_name(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _reads_integers(read: list[str]) -> bool:
    """Of a fused attention: query, key and value are integers; what else it reads is a mask."""
    integers = [name for name in read if name in _INTEGER]
    return len(integers) >= min(3, len(read))
