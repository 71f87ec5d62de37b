"""Why a product of a file runs in float in TensorRT, from the file: measured with TensorRT for RTX 1.7.1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fxquant.targets.document import Wiring
from fxquant.targets.lint_reader import MOVES, PRODUCTS, attribute, title
from fxquant.targets.tensorrt_plan import Operation

if TYPE_CHECKING:
    import onnx

# What hands codes on between a DequantizeLinear and a product; a Mul by a constant and a Cast count in.
CARRIES = (*MOVES, "Slice", "Split", "Gather", "Tile", "DepthToSpace", "SpaceToDepth", "Dropout", "Cast", "Mul")


def reason(node: onnx.NodeProto, products: Sequence[Operation], wiring: Wiring, capability: str | None) -> str:
    """The first thing that keeps the node from integers; ``products`` are what it became in the plan."""
    if node.op_type == "ConvTranspose":
        return "TensorRT has no integer transposed convolution"
    if not products:
        return "no product of the plan stands for it: it was folded, or is computed inside another kernel"
    for each in (*_operands(node, wiring), *_weight(node, wiring)):
        return each
    if node.op_type == "Conv" and capability == "7.5":
        return "with compute capability 7.5 TensorRT runs convolutions in float"
    return "TensorRT chose a float kernel"


def _operands(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    """Operands that come without a DequantizeLinear, or not directly out of it."""
    for index in range(min(2, len(node.input))):
        pair, between = _origin(wiring, node.input[index])
        stopping = [each for each in between if each.op_type not in CARRIES]
        if pair is None:
            yield f"operand {index} is not quantized"
        elif stopping:
            yield f"{title(stopping[0])} stands between it and the DequantizeLinear of operand {index}, no Q/DQ after"
        elif pair.input[0] not in wiring.constants:
            shape = _shape(wiring, pair.input[1])
            if shape and (node.op_type == "Conv" or shape != (1,)):
                yield f"the scale of operand {index} must be a scalar: got shape {shape}"


def _weight(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    """Scales of the weight that the integer kernel does not take."""
    pair, _ = _origin(wiring, node.input[1])
    if pair is None or pair.input[0] not in wiring.constants:
        return
    if attribute(pair, "block_size"):
        yield "its weight has scales per block: the codes are made floats before the product"
    elif node.op_type == "Conv" and len(_shape(wiring, pair.input[1])) == 1 and attribute(pair, "axis") != 0:
        yield f"the scales of its weight must run along axis 0: got axis {attribute(pair, 'axis')}"


def _origin(wiring: Wiring, name: str) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
    """The nearest DequantizeLinear upward, before which no product stands, and what is between."""
    between: list[onnx.NodeProto] = []
    node = wiring.producer.get(name)
    while node is not None and node.op_type not in (*PRODUCTS, "DequantizeLinear"):
        between.append(node)
        node = wiring.producer.get(next((i for i in node.input if i and i not in wiring.constants), ""))
    return (node if node is not None and node.op_type == "DequantizeLinear" else None), between


def _shape(wiring: Wiring, name: str) -> tuple[int, ...]:
    """The shape of a constant; that of a scalar where it is computed."""
    tensor = wiring.initializers.get(name)
    return () if tensor is None else tuple(tensor.dims)
