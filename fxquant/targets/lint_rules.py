"""What lint rules are and ask of a graph; the rules for all targets, for onnxruntime and for OpenVINO."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxquant.support.require import require
from fxquant.targets.document import Wiring, all_nodes
from fxquant.targets.profiles import Profile

if TYPE_CHECKING:
    import onnx


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")

# Ops that move values: Q and DQ with one scale may stand on either side of them.
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "MaxPool", "Pad")

# Beside those, what TensorRT's rules on places find between a DequantizeLinear and a product: one finding is enough.
MISPLACED = (*MOVES, "Cast", "Mul")

# TensorRT's operator that quantizes activations to fp4: its results are the codes and their fp8 block scales.
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"
Breaches = Iterator[tuple["onnx.NodeProto | None", str]]
Rule = Callable[["Reader"], Breaches]
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {}


def rule(*targets: str) -> Callable[[Rule], Rule]:
    """Registers a rule for some targets, for all if none are named; ``_its_name`` becomes ``its-name``.

    A rule yields each node that breaks it, or None for the model, and in which way; its docstring is what it asks.
    """

    def register(found: Rule) -> Rule:
        _RULES[found.__name__.strip("_").replace("_", "-")] = (found, targets)
        return found

    return register


def rules_of(target: str) -> dict[str, Rule]:
    """The rules of a target by name."""
    return {name: found for name, (found, targets) in _RULES.items() if not targets or target in targets}


def doc(found: Rule) -> str:
    """What a rule asks."""
    return inspect.getdoc(found) or ""


@dataclass(frozen=True, kw_only=True)
class Reader(Wiring):
    """The questions that rules ask of a graph that is meant for ``profile``."""

    profile: Profile

    @cached_property
    def opset(self) -> int:
        """Of the standard's operators."""
        return max((e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """All nodes, those of nested graphs too."""
        return list(all_nodes(self.model.graph))

    def of(self, *ops: str) -> Iterator[onnx.NodeProto]:
        """Nodes of some operators."""
        return (node for node in self.nodes if node.op_type in ops)

    def source(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """What computes an input."""
        return self.producer.get(node.input[index]) if index < len(node.input) else None

    def origin(
        self, node: onnx.NodeProto, index: int, through: tuple[str, ...] = MOVES
    ) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
        """What computes an input behind the ops named, and those that stand between, from the input upward."""
        found, between = self.source(node, index), []
        while found is not None and found.op_type in through:
            between.append(found)
            found = self.source(found, next((i for i, n in enumerate(found.input) if n not in self.constants), 0))
        return found, between

    def pair(self, node: onnx.NodeProto, index: int, through: tuple[str, ...] = MOVES) -> onnx.NodeProto | None:
        """The DequantizeLinear that an input comes out of, moved at most."""
        found, _ = self.origin(node, index, through)
        return found if found is not None and found.op_type == "DequantizeLinear" else None

    def quantized_from(self, dequantize: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """The node whose result a Q/DQ pair stands on, given its DequantizeLinear."""
        quantize = None if dequantize is None else self.source(dequantize, 0)
        return self.source(quantize, 0) if quantize is not None and quantize.op_type == "QuantizeLinear" else None

    def readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What reads the node's first output."""
        return self.consumers.get(node.output[0], [])

    def ends(self, node: onnx.NodeProto, through: tuple[str, ...]) -> Iterator[onnx.NodeProto]:
        """What reads the node's result behind the ops named."""
        for reader in self.readers(node):
            if reader.op_type in through:
                yield from self.ends(reader, through)
            else:
                yield reader

    def is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a Q or DQ stands on a constant."""
        return node.input[0] in self.constants

    def is_dynamic(self, name: str) -> bool:
        """Whether a value comes from TensorRT's own quantizer to fp4."""
        node = self.producer.get(name)
        while node is not None and node.op_type == "DequantizeLinear":
            node = self.source(node, 0)
        return node is not None and node.op_type == FP4_QUANTIZE

    def codes(self, node: onnx.NodeProto) -> str | None:
        """As ``code_type``, TensorRT's own quantizer included."""
        source = self.source(node, 0) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == FP4_QUANTIZE:
            return "FLOAT4E2M1" if source.output[0] == node.input[0] else "FLOAT8E4M3FN"
        return self.code_type(node)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant."""
        tensor = self.initializers.get(name)
        return None if tensor is None else tuple(tensor.dims)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute's value, None where it is not given."""
    return next((require("onnx").helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def title(node: onnx.NodeProto) -> str:
    """What messages call a node."""
    return f"{node.op_type} '{node.name or node.output[0]}'"


@rule()
def _opset_is_read(reader: Reader) -> Breaches:
    """The opset is one that the target reads."""
    if reader.opset > reader.profile.highest_opset:
        yield (
            None,
            f"opset {reader.opset} is beyond {reader.profile.highest_opset}, the highest for {reader.profile.name}",
        )


@rule()
def _blocks_have_their_opset(reader: Reader) -> Breaches:
    """Scales per block, and 4-bit integers, are in the standard from opset 21 on."""
    for node in reader.of(*QDQ) if reader.opset < 21 else ():
        what = "scales per block" if attribute(node, "block_size") else f"{(reader.codes(node) or '').lower()} codes"
        if attribute(node, "block_size") or reader.codes(node) in ("INT4", "UINT4"):
            yield node, f"it has {what} in opset {reader.opset}: they want 21"


@rule()
def _scale_is_positive(reader: Reader) -> Breaches:
    """Scales are constant, finite and above 0."""
    np = require("numpy")
    for node in reader.of(*QDQ):
        if node.input[1] not in reader.constants:
            if not reader.is_dynamic(node.input[1]):
                yield node, "its scale is computed at run time"
            continue
        scale = reader.array(node, 1)
        if scale is not None:
            wide = np.asarray(scale, dtype=np.float32)
            if not (np.isfinite(wide).all() and (wide > 0).all()):
                yield node, f"its scale must be finite and above 0: got {wide.min():g} to {wide.max():g}"


@rule()
def _zero_point_is_given(reader: Reader) -> Breaches:
    """The zero point is an input with the scale's shape: its type says what the codes are. Float codes need none."""
    for node in reader.of(*QDQ):
        if len(node.input) < 3 or not node.input[2]:
            if not (reader.codes(node) or "").startswith("FLOAT"):
                yield node, "it has no zero point: the type of its codes is left to the reader"
            continue
        scale, point = reader.shape(node.input[1]), reader.shape(node.input[2])
        if scale is not None and point is not None and scale != point:
            yield node, f"scale and zero point differ in shape: {scale} and {point}"


@rule()
def _axis_is_given(reader: Reader) -> Breaches:
    """Scales per channel or block name their axis: the default is 1 in ONNX and read as 0 elsewhere."""
    for node in reader.of(*QDQ):
        count = math.prod(reader.shape(node.input[1]) or ())
        if count > 1 and attribute(node, "axis") is None:
            yield node, f"it has {count} scales and no axis"


@rule()
def _scale_fits_the_axis(reader: Reader) -> Breaches:
    """There is a scale for each channel, or for each block of one, along the axis."""
    for node in reader.of(*QDQ):
        scale, tensor = reader.shape(node.input[1]), reader.shape(node.input[0])
        if scale is None or tensor is None or math.prod(scale) == 1:
            continue
        axis = attribute(node, "axis")
        axis = 1 if axis is None else axis
        if not -len(tensor) <= axis < len(tensor):
            yield node, f"axis {axis} of a tensor of shape {tensor}"
            continue
        size, axis = attribute(node, "block_size"), axis % len(tensor)
        blocks = -(-tensor[axis] // size) if size else tensor[axis]
        wanted = (*tensor[:axis], blocks, *tensor[axis + 1 :]) if size else (blocks,)
        if scale != wanted:
            yield node, f"scales of shape {scale} on axis {axis} of a tensor of shape {tensor}: {wanted} would fit"


@rule()
def _one_quantizer_per_tensor(reader: Reader) -> Breaches:
    """A tensor has one QuantizeLinear, and no codes are quantized again."""
    seen: dict[str, onnx.NodeProto] = {}
    for node in reader.of("QuantizeLinear"):
        if node.input[0] in seen:
            yield node, f"its input is quantized by {title(seen[node.input[0]])} too"
        seen.setdefault(node.input[0], node)
        if reader.pair(node, 0, ()) is not None:
            yield node, "it quantizes what was just dequantized"


@rule()
def _batch_norm_is_folded(reader: Reader) -> Breaches:
    """No BatchNormalization follows a quantized convolution."""
    for node in reader.of("BatchNormalization"):
        head = reader.source(node, 0)
        if head is not None and head.op_type in ("Conv", "ConvTranspose") and reader.pair(head, 1) is not None:
            yield node, f"it stands behind {title(head)}, whose weight is quantized unfolded"


@rule()
def _operands_go_together(reader: Reader) -> Breaches:
    """Where one operand of a product is quantized, so is the other; a weight alone may be."""
    through = MISPLACED if reader.profile.name == "tensorrt" else MOVES
    for node in reader.of(*PRODUCTS):
        pairs = [reader.pair(node, index, through) for index in (0, 1)]
        for index, pair in enumerate(pairs):
            if pair is not None and not reader.is_weight(pair) and pairs[1 - index] is None:
                yield node, f"operand {index} is quantized, operand {1 - index} is not"


@rule()
def _weight_axis_is_the_output_channel(reader: Reader) -> Breaches:
    """A weight's scales run along its output channels."""
    for node in reader.of(*PRODUCTS):
        source, between = reader.origin(node, 1, ("Transpose", "Identity"))
        if source is None or source.op_type != "DequantizeLinear" or not reader.is_weight(source):
            continue
        scale, weight = reader.shape(source.input[1]), reader.shape(source.input[0])
        if scale is None or weight is None or len(scale) != 1 or scale[0] == 1 or attribute(source, "block_size"):
            continue
        axis = (1 if attribute(source, "axis") is None else attribute(source, "axis")) % len(weight)
        wanted = _output_axis(node, len(weight))
        for transpose in (n for n in between if n.op_type == "Transpose"):
            wanted = (attribute(transpose, "perm") or list(range(len(weight)))[::-1])[wanted]
        if axis != wanted:
            yield source, f"its scales run along axis {axis}; {title(node)} has its output channels on axis {wanted}"


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB") else 1
    return rank - 1


@rule("onnxruntime")
def _activation_codes_are_bytes(reader: Reader) -> Breaches:
    """Integer kernels read uint8 or int8 activations."""
    for node in reader.of("QuantizeLinear"):
        kind = reader.code_type(node)
        if kind not in (None, "UINT8", "INT8"):
            yield node, f"its codes are {kind.lower()}: onnxruntime's kernels stay float there"


@rule("onnxruntime")
def _blocks_beside_codes_are_int4(reader: Reader) -> Breaches:
    """Beside a quantized activation, a weight in blocks has 4-bit codes: of others the product fails at run time."""
    for node in reader.of("MatMul", "Gemm"):
        activation, weight = reader.pair(node, 0), reader.pair(node, 1)
        if activation is None or weight is None or not attribute(weight, "block_size"):
            continue
        kind = reader.code_type(weight)
        if kind in ("INT8", "UINT8"):
            yield weight, f"its blocks of {kind.lower()} codes stand beside a quantized activation in {title(node)}"


@rule("openvino")
def _blocks_divide_the_axis(reader: Reader) -> Breaches:
    """Blocks are all of one size: OpenVINO loads no others."""
    for node in reader.of("DequantizeLinear"):
        size, shape = attribute(node, "block_size"), reader.shape(node.input[0])
        axis = attribute(node, "axis")
        if size and shape is not None and shape[axis if axis is not None else 1] % size:
            yield node, f"blocks of {size} do not divide axis {axis} of codes of shape {shape}"


@rule("openvino")
def _right_operand_is_symmetric(reader: Reader) -> Breaches:
    """The right operand of a product of two activations has int8 codes with zero point 0, or the same as uint8."""
    for node, pair in _activation_pairs(reader, "MatMul", 1):
        kind, point = reader.code_type(pair), _zero_point(reader, pair)
        if (kind, point) not in (("INT8", 0), ("UINT8", 128)):
            what = f"{(kind or 'unknown').lower()} codes with zero point {point}"
            yield node, f"its right operand must have int8 codes with zero point 0: got {what}"


@rule("openvino")
def _zero_point_of_operand_is_zero(reader: Reader) -> Breaches:
    """The left operand of a product of two activations, and the input of a ConvTranspose, have zero point 0."""
    for op in ("MatMul", "ConvTranspose"):
        for node, pair in _activation_pairs(reader, op, 0):
            right = reader.pair(node, 1)
            if op == "MatMul" and (right is None or reader.is_weight(right)):
                continue
            point = _zero_point(reader, pair)
            if point:
                yield node, f"zero point of its operand 0 must be 0: got {point}, and OpenVINO runs it in float"


def _activation_pairs(reader: Reader, op: str, index: int) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    for node in reader.of(op):
        pair = reader.pair(node, index)
        if pair is not None and not reader.is_weight(pair):
            yield node, pair


def _zero_point(reader: Reader, pair: onnx.NodeProto) -> int | None:
    point = reader.array(pair, 2)
    return int(point) if point is not None and point.size == 1 else None
