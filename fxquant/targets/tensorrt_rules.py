"""TensorRT's rules for QuantizeLinear / DequantizeLinear, each measured with its ONNX parser and builder.

A finding is a file that does not parse or build, a product whose operands are quantized and that runs in float, or
numbers that are not ONNX's. `MEASURED` names the versions; what is of documents says so. Where these rules and the
builder differ, the builder is right: ``tests/targets/test_tensorrt_rules.py`` holds one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.lint_reader import MOVES, PRODUCTS, QDQ, Breaches, LintReader, Rules, attribute, title
from fxquant.targets.tensorrt_reasons import CARRIERS, obstacles, origin

if TYPE_CHECKING:
    import onnx


MEASURED = "TensorRT for RTX 1.7.1, ONNX parser 2.0.0"

RULES = Rules()

# What the common rules look through between a DequantizeLinear and a product: a rule of this file tells the rest.
THROUGH = (*CARRIERS, "Mul", "Concat", "Relu", "Clip", "AveragePool", "Resize", "Where")

# Common rules that ask for more than its parser and builder do: scales without an axis run along 1, as ONNX says, a
# tensor may have two quantizers, and BatchNormalization is merged after the integer convolution.
WAIVED = ("axis-is-given", "one-quantizer-per-tensor", "batch-norm-is-folded")

# TensorRT's operator that quantizes activations to fp4: its results are the codes and their fp8 block scales.
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"

# Codes that it knows → of which kind they are in a product.
_FAMILIES = {"INT8": "integer", "INT4": "integer", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}

_UNKNOWN = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "SoftmaxCrossEntropyLoss")
_SCATTERS = ("ScatterND", "ScatterElements")
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")

# Operators whose operands have one type, as everything is strongly typed from TensorRT 11 on.
_ONE_TYPE = (*PRODUCTS, "Add", "Sub", "Mul", "Div", "Min", "Max", "Concat", "LayerNormalization")

# What stands between the scores of attention and their softmax.
_MASKING = ("Mul", "Div", "Add", "Sub", "Where")


@RULES.add
def _operators_are_read(reader: LintReader) -> Breaches:
    """Integers come in as Q/DQ around float operators, and the parser knows the operators as they are written."""
    for node in reader.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in _UNKNOWN:
            yield node, f"TensorRT does not read {node.op_type}"
        elif node.op_type in _SCATTERS and attribute(node, "reduction") not in (None, b"none"):
            yield node, f"TensorRT does not read {node.op_type} with a reduction"
        elif node.op_type == "MaxPool" and any(size > 1 for size in attribute(node, "dilations") or ()):
            yield node, "TensorRT does not read MaxPool with dilations"


@RULES.add
def _zero_point_is_zero(reader: LintReader) -> Breaches:
    """Quantization is symmetric: every zero point is 0, and a constant."""
    np = require("numpy")
    for node in reader.of(*QDQ):
        point = reader.array(node, 2)
        if point is not None and np.asarray(point, dtype=np.float32).any():
            yield node, f"its zero point must be 0: got {np.ravel(point)[:3].tolist()}"
        elif len(node.input) > 2 and node.input[2] and node.input[2] not in reader.constants:
            yield node, "its zero point must be a constant 0: it is computed at run time"


@RULES.add
def _codes_are_known(reader: LintReader) -> Breaches:
    """Codes are int8, int4, fp8 e4m3 or fp4; of uint8 ones, those above 127 would be lost."""
    for node in reader.of(*QDQ):
        kind = reader.codes(node)
        if kind is not None and kind not in _FAMILIES:
            what = "an int32 bias must stay float" if kind == "INT32" else "TensorRT has no such codes"
            yield node, f"its codes are {kind.lower()}: {what}"


@RULES.add
def _blocks_stand_beside_floats(reader: LintReader) -> Breaches:
    """A weight with scales per block is multiplied by floats: beside codes only the first block's scales are used."""
    for node in reader.of(*PRODUCTS):
        activation, weight = (origin(reader, node, index) for index in (0, 1))
        if activation.pair is None or activation.stopper or weight.pair is None or not reader.is_weight(weight.pair):
            continue
        if attribute(weight.pair, "block_size") and not attribute(activation.pair, "block_size"):
            yield weight.pair, f"its blocks stand beside a quantized activation in {title(node)}"


@RULES.add
def _int4_is_of_matrices(reader: LintReader) -> Breaches:
    """Convolutions have no int4 weights: the same codes in int8 are right."""
    for node in reader.of("Conv"):
        pair = origin(reader, node, 1).pair
        if pair is not None and reader.codes(pair) == "INT4":
            yield pair, f"int4 codes are no weight of {title(node)}: write them as int8"


@RULES.add
def _codes_of_operands_go_together(reader: LintReader) -> Breaches:
    """Both operands of a product have integer codes, or both fp8, or both fp4."""
    for node in reader.of(*PRODUCTS):
        pairs = [origin(reader, node, index).pair for index in (0, 1)]
        kinds = [_FAMILIES.get(reader.codes(pair) or "") for pair in pairs if pair is not None]
        if len(kinds) == 2 and None not in kinds and kinds[0] != kinds[1]:
            yield node, f"it multiplies {kinds[0]} codes by {kinds[1]} codes"


@RULES.add
def _every_input_is_quantized(reader: LintReader) -> Breaches:
    """Every input of a product is quantized; beside a weight in int4 or in blocks the activation may be float."""
    for node in reader.of("Conv", "Gemm", "MatMul"):
        pairs = [reader.pair(node, index, THROUGH) for index in (0, 1)]
        for index, pair in enumerate(pairs):
            if pair is None or pairs[1 - index] is not None or not reader.is_weight(pair):
                continue
            if reader.codes(pair) != "INT4" and not attribute(pair, "block_size"):
                yield node, f"its weight is quantized, its operand {1 - index} is not"


@RULES.add
def _products_run_on_codes(reader: LintReader) -> Breaches:
    """A product reads its Q/DQ directly, or through what only moves codes; its activations have a scalar scale."""
    for node in reader.of(*PRODUCTS):
        pairs = [origin(reader, node, index).pair for index in (0, 1)]
        meant = [pair for pair in pairs if pair is not None]
        if len(meant) == 2 or (meant and node.op_type == "ConvTranspose"):
            for message in obstacles(reader, node):
                yield node, message


@RULES.add
def _types_go_together(reader: LintReader) -> Breaches:
    """The operands of an operator have one float type: networks are strongly typed."""
    for node in reader.of(*_ONE_TYPE):
        kinds = dict.fromkeys(kind for name in node.input if (kind := reader.types.get(name)) in _FLOATS)
        if len(kinds) > 1:
            yield node, f"its operands are {' and '.join(map(str.lower, kinds))}: TensorRT asks for one type"


@RULES.add
def _fp4_is_in_blocks(reader: LintReader) -> Breaches:
    """fp4 has blocks of 16 with fp8 scales after one float scale, and activations get theirs from TensorRT's own
    quantizer (its documents: other forms build, and what they compute was not seen)."""
    for node in reader.of(*QDQ):
        if reader.codes(node) != "FLOAT4E2M1":
            continue
        if node.op_type == "QuantizeLinear":
            if not reader.is_weight(node):
                yield node, f"activations become fp4 by trt::{FP4_QUANTIZE}, not by QuantizeLinear"
            continue
        if attribute(node, "block_size") != 16:
            yield node, f"its blocks must hold 16 codes: got {attribute(node, 'block_size')}"
        yield from _axis_divides(reader, node, 16)
        scale = reader.source(node, 1)
        if scale is None or scale.op_type != "DequantizeLinear" or reader.codes(scale) != "FLOAT8E4M3FN":
            yield node, "its scales must be fp8 codes after a DequantizeLinear"
        elif math.prod(reader.shape(scale.input[1]) or ()) > 1:
            yield scale, "fp8 block scales must have one float scale"


def _axis_divides(reader: LintReader, node: onnx.NodeProto, size: int) -> Breaches:
    shape, axis = reader.shape(node.input[0]), attribute(node, "axis")
    axis = 1 if axis is None else axis
    if shape and -len(shape) <= axis < len(shape) and shape[axis] % size:
        yield node, f"axis {axis} of its codes must be a multiple of {size}: got {shape[axis]}"


@RULES.add
def _attention_stays_whole(reader: LintReader) -> Breaches:
    """Attention is one kernel where all of query, key, probabilities and value have int8 codes, or in half types fp8
    ones, or in half types none: Q/DQ on some of them make it several, of which some are float."""
    for softmax, product, _ in _attentions(reader):
        seconds = [user for user in reader.ends(softmax, (*MOVES, *QDQ)) if user.op_type == "MatMul"]
        kinds = {_kind(reader, product, index) for index in (0, 1)}
        for second in seconds:
            whole = kinds | {_kind(reader, second, index) for index in (0, 1)}
            if kinds == {"FLOAT8E4M3FN"} and len(whole) > 1:
                yield second, f"{title(product)} reads fp8, its own operands are not all fp8"
            elif len(whole) > 1 and reader.types.get(product.output[0]) in ("FLOAT16", "BFLOAT16"):
                yield product, f"attention in half types has codes in a part of its operands: {title(second)} is float"


def _kind(reader: LintReader, product: onnx.NodeProto, index: int) -> str | None:
    pair = origin(reader, product, index).pair
    return None if pair is None else reader.codes(pair)


def _attentions(reader: LintReader) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, list[onnx.NodeProto]]]:
    """Softmax, a product that its scores come from, and what stands between them; other summands are followed too."""

    for softmax in reader.of("Softmax"):
        waiting: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]] = [(softmax, [])]
        seen = set()
        while waiting:
            node, between = waiting.pop()
            for name in node.input:
                source = None if name in seen else reader.producer.get(name)
                seen.add(name)
                if source is not None and source.op_type == "MatMul":
                    yield softmax, source, between
                elif source is not None and source.op_type in (*MOVES, *_MASKING):
                    waiting.append((source, [*between, source]))
