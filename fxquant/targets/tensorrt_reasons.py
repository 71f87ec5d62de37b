"""Why a product of a file runs in float in TensorRT, from the file: measured with TensorRT for RTX 1.7.1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.document import Wiring
from fxquant.targets.lint_reader import MOVES, PRODUCTS, attribute, title
from fxquant.targets.tensorrt_plan import Operation

if TYPE_CHECKING:
    import onnx

# What hands codes on between a DequantizeLinear and a product; see `_carries` for three that do so at times. One Cast
# may stand there, not one to a narrower type and back.
CARRIERS = (*MOVES, "Slice", "Split", "Gather", "Tile", "DepthToSpace", "SpaceToDepth", "Dropout", "Cast")

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze")

CODES = frozenset({"int8", "fp8_e4m3", "fp4_e2m1"})
"""Types of operands, as plans name them, that are codes."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an operand of a product comes from.

    Attributes:
        pair: the nearest DequantizeLinear upward, before which no other product stands.
        stopper: the first node between them that computes in float, if one does.
    """

    pair: onnx.NodeProto | None
    stopper: onnx.NodeProto | None


def origin(wiring: Wiring, node: onnx.NodeProto, index: int) -> Origin:
    """Of operand ``index`` of a product."""
    stopper, name, casts = None, node.input[index], 0
    found = wiring.producer.get(name)
    while found is not None and found.op_type not in (*PRODUCTS, "Einsum", "DequantizeLinear"):
        casts += found.op_type == "Cast"
        if stopper is None and (casts > 1 or not _carries(wiring, found)):
            stopper = found
        name = next((i for i in found.input if i and i not in wiring.constants), next(iter(found.input), ""))
        found = wiring.producer.get(name)
    return Origin(pair=found if found is not None and found.op_type == "DequantizeLinear" else None, stopper=stopper)


def _carries(wiring: Wiring, node: onnx.NodeProto) -> bool:
    """Whether the node hands codes on as they are."""
    if node.op_type == "MaxPool":
        return len(attribute(node, "kernel_shape") or ()) < 3
    if node.op_type == "Mul":
        return any(name in wiring.constants for name in node.input)
    if node.op_type == "Concat":
        origins = [origin(wiring, node, index) for index in range(len(node.input))]
        scales = [_one_scale(wiring, each.pair) for each in origins if each.pair is not None and each.stopper is None]
        return len(scales) == len(origins) and None not in scales and len(set(scales)) == 1
    return node.op_type in CARRIERS


def _one_scale(wiring: Wiring, pair: onnx.NodeProto) -> float | None:
    scale = wiring.array(pair, 1)
    return float(scale) if scale is not None and scale.size == 1 else None


def obstacles(wiring: Wiring, node: onnx.NodeProto) -> Iterator[str]:
    """What keeps the integer or fp8 kernel from a product whose operands are quantized."""
    if node.op_type == "ConvTranspose":
        yield "TensorRT has no integer transposed convolution"
        return
    for index in range(2):
        found = origin(wiring, node, index)
        if found.pair is None:
            continue
        if found.stopper is not None:
            yield f"{title(found.stopper)}, which computes in float, stands between operand {index} and its Q/DQ"
        elif found.pair.input[0] in wiring.constants:
            continue
        elif wiring.scopes[found.pair.output[0]] != wiring.scopes[node.output[0]]:
            yield f"the Q/DQ of operand {index} must stand in the same branch or loop body as the product"
        elif not _takes_scale(wiring, node, found.pair):
            shape = scale_shape(wiring, found.pair)
            yield f"the scale of operand {index} must be a scalar: got shape {shape}"
    if len(node.input) > 1 and _becomes_heads(wiring, node):
        yield (
            "its result is split in three parts that become heads, as query, key and value do: TensorRT splits the "
            "weight instead, after its DequantizeLinear. A Mul by 1 after the product keeps it whole"
        )


def _becomes_heads(wiring: Wiring, node: onnx.NodeProto) -> bool:
    """Whether a product's result is split in three, and each part is reshaped and then transposed."""
    weight = origin(wiring, node, 1).pair if node.op_type != "Conv" else None
    if weight is None or weight.input[0] not in wiring.initializers or attribute(weight, "block_size"):
        return False
    if not any(size > 1 for size in scale_shape(wiring, weight)):
        return False
    parts = list(_parts(wiring, node.output[0], False))
    return len(parts) == 3 and all(_is_transposed(wiring, *part) for part in parts)


def _parts(wiring: Wiring, name: str, reshaped: bool) -> Iterator[tuple[str, bool]]:
    """What a value is split into, after what adds to it or reshapes it, and whether one reshaped it."""
    for reader in wiring.consumers.get(name, []):
        if reader.op_type == "Split":
            yield from ((part, reshaped) for part in reader.output if wiring.consumers.get(part))
        elif reader.op_type in ("Slice", "Gather"):
            yield reader.output[0], reshaped or reader.op_type == "Gather"
        elif reader.op_type in (*_RESHAPES, "Add", "Cast", "Identity"):
            yield from _parts(wiring, reader.output[0], reshaped or reader.op_type in _RESHAPES)


def _is_transposed(wiring: Wiring, name: str, reshaped: bool) -> bool:
    readers = wiring.consumers.get(name, [])
    if reshaped and any(reader.op_type == "Transpose" for reader in readers):
        return True
    return any(_is_transposed(wiring, reader.output[0], True) for reader in readers if reader.op_type in _RESHAPES)


def _takes_scale(wiring: Wiring, node: onnx.NodeProto, pair: onnx.NodeProto) -> bool:
    shape = scale_shape(wiring, pair)
    return shape == () or (shape == (1,) and node.op_type != "Conv") or attribute(pair, "block_size") not in (None, 0)


def scale_shape(wiring: Wiring, pair: onnx.NodeProto) -> tuple[int, ...]:
    """Of a Q's or DQ's scale; that of a scalar where it is computed."""
    tensor = wiring.initializers.get(pair.input[1])
    return () if tensor is None else tuple(tensor.dims)


def reason(node: onnx.NodeProto, products: Sequence[Operation], wiring: Wiring, capability: str | None) -> str:
    """The first thing that keeps the node from integers; ``products`` are what it became in the plan."""
    if not products:
        return "no product of the plan stands for it: it was folded, or is computed inside another kernel"
    if any("unknown" in each.reads[:2] for each in products):
        return "the types that it reads cannot be read from the plan"
    return next(_why_float(node, wiring, capability))


def _why_float(node: onnx.NodeProto, wiring: Wiring, capability: str | None) -> Iterator[str]:
    stoppers = [origin(wiring, node, index).stopper for index in range(min(2, len(node.input)))]
    if any(each is not None and each.op_type == "TRT_MXFP8DequantizeLinear" for each in stoppers):
        yield "TensorRT for RTX makes floats of MXFP8 codes before it multiplies"
    yield from obstacles(wiring, node)
    if node.op_type == "Einsum" and len(node.input) > 2:
        yield f"it is several products, of {len(node.input)} operands: what they make is multiplied in float"
    if wiring.constants.issuperset(node.input[:2]):
        yield "both its operands are constants"
    for index in range(min(2, len(node.input))):
        if origin(wiring, node, index).pair is None:
            yield f"operand {index} is not quantized"
    weight = origin(wiring, node, 1).pair
    if weight is not None and weight.input[0] in wiring.constants:
        if attribute(weight, "block_size"):
            yield "its weight has scales per block: the codes are made floats before the product"
        if any(size > 1 for size in scale_shape(wiring, weight)) and not _along_outputs(wiring, node, weight):
            yield f"the scales of its weight may run along another axis than that of its outputs: {_axis(weight)}"
    if node.op_type == "Conv" and capability == "7.5":
        yield "with compute capability 7.5 TensorRT runs convolutions in float"
    yield f"TensorRT for RTX chose a float kernel, as {require('tensorrt_rtx').__version__} does for no known reason"


def _along_outputs(wiring: Wiring, node: onnx.NodeProto, pair: onnx.NodeProto) -> bool:
    """Whether scales are known to run along the product's outputs: the weight goes into it as it is."""
    axis, codes = attribute(pair, "axis"), wiring.initializers.get(pair.input[0])
    if codes is None or pair.output[0] != node.input[1]:
        return False
    last = len(codes.dims) - 1
    outputs = {"Conv": 0, "Gemm": 0 if attribute(node, "transB") else 1, "MatMul": last}.get(node.op_type)
    return (1 if axis is None else axis) % len(codes.dims) == outputs


def _axis(pair: onnx.NodeProto) -> str:
    axis = attribute(pair, "axis")
    return f"axis {1 if axis is None else axis} of the codes"
