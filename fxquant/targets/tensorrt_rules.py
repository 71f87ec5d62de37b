"""TensorRT's rules for QuantizeLinear / DequantizeLinear, from its documents and the sources of its ONNX parser.

Left out, because a graph does not tell: whether float16 or bfloat16 was meant where the tensors and scales are
float32 (TensorRT 11 runs what is outside Q/DQ in the type that is written), and whether a layer that could run on
integers was left in float on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.lint_reader import MOVES, PRODUCTS, QDQ, Breaches, LintReader, Rules, attribute, title

if TYPE_CHECKING:
    import onnx


RULES = Rules()

# What the rules on places find between a DequantizeLinear and a product.
MISPLACED = ("Cast", "Mul")

# TensorRT's operator that quantizes activations to fp4: its results are the codes and their fp8 block scales.
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"

_THROUGH = (*MOVES, *MISPLACED)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_ACTIVATIONS = ("Relu", "Clip", "BatchNormalization")
_INTEGER = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")

# What stands between the scores of attention and their softmax.
_MASKING = ("Mul", "Div", "Add", "Sub", "Where")


@RULES.add
def _zero_point_is_zero(reader: LintReader) -> Breaches:
    """Quantization is symmetric: every zero point is 0."""
    np = require("numpy")
    for node in reader.of(*QDQ):
        point = reader.array(node, 2)
        if point is not None and np.asarray(point, dtype=np.float32).any():
            yield node, f"its zero point must be 0: got {np.ravel(point)[:3].tolist()}"


@RULES.add
def _codes_are_known(reader: LintReader) -> Breaches:
    """Codes are int8, fp8 e4m3 or fp4; those of weights may be int4."""
    for node in reader.of(*QDQ):
        kind = reader.codes(node)
        allowed = {"INT8", "FLOAT8E4M3FN", "FLOAT4E2M1"} | ({"INT4"} if reader.is_weight(node) else set())
        if kind is not None and kind not in allowed:
            what = "an int32 bias must stay float" if kind == "INT32" else "TensorRT has no such codes there"
            yield node, f"its codes are {kind.lower()}: {what}"


@RULES.add
def _no_integer_operators(reader: LintReader) -> Breaches:
    """Integers come in as Q/DQ around float operators, never as ONNX's integer operators."""
    for node in reader.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in _INTEGER:
            yield node, f"TensorRT does not read {node.op_type}"


@RULES.add
def _activations_have_one_scale(reader: LintReader) -> Breaches:
    """Only weights have a scale per channel."""
    for node in reader.of(*QDQ):
        shape = reader.shape(node.input[1])
        if shape is None or reader.is_weight(node) or attribute(node, "block_size"):
            continue
        if len(shape) == 1 and shape[0] > 1:
            yield node, f"an activation has {shape[0]} scales: TensorRT takes one"


@RULES.add
def _no_output_dtype(reader: LintReader) -> Breaches:
    """A DequantizeLinear's result has the type of its scale, and ``output_dtype`` is not given."""
    for node in reader.of("DequantizeLinear"):
        if attribute(node, "output_dtype"):
            yield node, "output_dtype on a DequantizeLinear is not read: give the scale that type"


@RULES.add
def _transposed_convolution_has_one_scale(reader: LintReader) -> Breaches:
    """The axis of a transposed convolution's scales is read in two ways: one scale is right under both."""
    for node in reader.of("ConvTranspose"):
        pair = reader.pair(node, 1)
        shape = None if pair is None else reader.shape(pair.input[1])
        if shape and shape[0] > 1:
            yield pair, f"{shape[0]} scales on the weight of {title(node)}"


@RULES.add
def _int4_is_in_blocks(reader: LintReader) -> Breaches:
    """int4 weights have an even last dimension and blocks of 64 or 128."""
    for node in reader.of("DequantizeLinear"):
        if reader.codes(node) != "INT4":
            continue
        size, shape = attribute(node, "block_size"), reader.shape(node.input[0])
        if size and size not in (64, 128):
            yield node, f"its blocks must hold 64 or 128 codes: got {size}"
        if shape and shape[-1] % 2:
            yield node, f"int4 codes must have an even last dimension: got shape {shape}"


@RULES.add
def _fp4_is_in_blocks(reader: LintReader) -> Breaches:
    """fp4 has blocks of 16 along a multiple of 16, with fp8 scales after one float scale; activations get theirs
    from TensorRT's own quantizer."""
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
        elif (reader.shape(scale.input[1]) or ()) not in ((), (1,)):
            yield scale, "fp8 block scales must have one float scale"


@RULES.add
def _fp8_blocks_hold_32(reader: LintReader) -> Breaches:
    """fp8 in blocks has blocks of 32 along a multiple of 32."""
    for node in reader.of(*QDQ):
        size = attribute(node, "block_size")
        if not size or reader.codes(node) != "FLOAT8E4M3FN":
            continue
        if size != 32:
            yield node, f"its blocks must hold 32 codes: got {size}"
        yield from _axis_divides(reader, node, 32)


def _axis_divides(reader: LintReader, node: onnx.NodeProto, size: int) -> Breaches:
    shape, axis = reader.shape(node.input[0]), attribute(node, "axis")
    axis = 1 if axis is None else axis
    if shape and -len(shape) <= axis < len(shape) and shape[axis] % size:
        yield node, f"axis {axis} of its codes must be a multiple of {size}: got {shape[axis]}"


@RULES.add
def _every_input_is_quantized(reader: LintReader) -> Breaches:
    """Every input of a product is quantized; beside an int4 weight the activation may be float."""
    for node in reader.of(*PRODUCTS):
        pairs = [reader.pair(node, index, _THROUGH) for index in (0, 1)]
        for index, pair in enumerate(pairs):
            if pair is None or not reader.is_weight(pair) or reader.codes(pair) == "INT4":
                continue
            if pairs[1 - index] is None:
                yield node, f"its weight is quantized, its operand {1 - index} is not"


@RULES.add
def _results_of_products_stay_float(reader: LintReader) -> Breaches:
    """A product's result is quantized only for a layer that runs on integers."""
    for node in reader.of("DequantizeLinear"):
        head = reader.quantized_from(node)
        if head is None or head.op_type not in (*PRODUCTS, "Relu", "Clip"):
            continue
        if head.op_type in ("Relu", "Clip"):
            head = reader.source(head, 0)
        if head is not None and head.op_type in PRODUCTS and not any(_wants_integers(reader, node)):
            yield reader.source(node, 0), f"it quantizes the result of {title(head)}, which nothing reads as integers"


def _wants_integers(reader: LintReader, node: onnx.NodeProto) -> Iterator[bool]:
    for user in reader.ends(node, MOVES):
        after = reader.ends(user, ("Relu", "Clip", *MOVES))
        quantized = user.op_type == "QuantizeLinear" or any(n.op_type == "QuantizeLinear" for n in after)
        yield quantized or user.op_type in (*PRODUCTS, "Add")


@RULES.add
def _other_layers_have_both_sides(reader: LintReader) -> Breaches:
    """A layer without a weight runs on integers if a DequantizeLinear is before it and a QuantizeLinear after it."""
    for node in reader.nodes:
        if node.op_type in (*PRODUCTS, *QDQ, *MOVES, "Cast") or not node.input:
            continue
        read = [index for index, name in enumerate(node.input) if name and name not in reader.constants]
        if not read or any(reader.pair(node, index) is None for index in read):
            continue
        users = [user.op_type for user in reader.ends(node, ("Relu", "Clip", *MOVES))]
        misplaced = node.op_type == "Mul" and all(user in PRODUCTS for user in users)  # see the rule on those
        if "QuantizeLinear" not in users and not misplaced:
            yield node, "what it reads is quantized, its result is not"


@RULES.add
def _skip_is_quantized(reader: LintReader) -> Breaches:
    """An Add that a quantized convolution ends in reads its other operand dequantized."""
    for node in reader.of("Add"):
        if any(name in reader.constants for name in node.input):
            continue
        direct = [_is_quantized_convolution(reader, reader.source(node, index)) for index in (0, 1)]
        if all(direct):
            yield node, "both operands come out of convolutions: one of them must be quantized"
        elif any(direct) and reader.pair(node, direct.index(False)) is None:
            yield node, f"its operand {direct.index(False)} must be quantized: the convolution's Add is float without"


@RULES.add
def _nothing_between_convolution_and_add(reader: LintReader) -> Breaches:
    """A convolution fuses with the Add after it only without Q/DQ between them: one operand comes directly."""
    for node in reader.of("Add"):
        pairs = [reader.pair(node, index, ()) for index in (0, 1)]
        heads = [_head_of_own_pair(reader, pair) for pair in pairs]
        if all(pair is not None for pair in pairs) and any(_is_quantized_convolution(reader, h) for h in heads):
            yield node, "Q/DQ stands between it and the convolution that would fuse with it"


@RULES.add
def _nothing_between_convolution_and_activation(reader: LintReader) -> Breaches:
    """A convolution fuses with the ReLU or BatchNormalization after it: no Q/DQ stands between them."""
    for node in reader.of(*_ACTIVATIONS):
        head = _head_of_own_pair(reader, reader.pair(node, 0, ()))
        if head is not None and head.op_type in _CONVOLUTIONS:
            yield node, f"Q/DQ stands between it and {title(head)}"


@RULES.add
def _nothing_between_pad_and_convolution(reader: LintReader) -> Breaches:
    """Pad and convolution fuse only without Q/DQ between them: quantize before the Pad."""
    for node in reader.of("Conv"):
        pad = reader.quantized_from(reader.pair(node, 0, ()))
        if pad is not None and pad.op_type == "Pad":
            yield node, f"Q/DQ stands between it and {title(pad)}"


def _is_quantized_convolution(reader: LintReader, node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type in _CONVOLUTIONS and reader.pair(node, 1) is not None


def _head_of_own_pair(reader: LintReader, pair: onnx.NodeProto | None) -> onnx.NodeProto | None:
    """What a Q/DQ pair with a single reader stands on: nothing else asks for the pair."""
    return reader.quantized_from(pair) if pair is not None and len(reader.readers(pair)) == 1 else None


@RULES.add
def _nothing_between_dequantize_and_product(reader: LintReader) -> Breaches:
    """A product reads its DequantizeLinear directly: Cast, Transpose and Mul stand before the QuantizeLinear. A
    weight may be transposed."""
    for node in reader.of(*PRODUCTS):
        for index in (0, 1):
            pair, between = reader.origin(node, index, _THROUGH)
            if pair is None or pair.op_type != "DequantizeLinear":
                continue
            stopping = ("Cast", "Mul") if reader.is_weight(pair) else ("Cast", "Mul", "Transpose")
            for found in between:
                if found.op_type in stopping:
                    yield found, f"it stands between {title(pair)} and {title(node)}"


@RULES.add
def _attention_is_scaled_before_the_product(reader: LintReader) -> Breaches:
    """In quantized attention the scale is applied to a factor, not between the first product and the Softmax."""
    seen = set()
    for _, product, between in _attentions(reader):
        if reader.pair(product, 0) is None or reader.pair(product, 1) is None:
            continue
        for node in between:
            scales = node.op_type in ("Mul", "Div") and any(name in reader.constants for name in node.input)
            if scales and node.output[0] not in seen:
                seen.add(node.output[0])
                yield node, f"it scales the scores of {title(product)}: scale an operand before its QuantizeLinear"


@RULES.add
def _fp8_attention_is_whole(reader: LintReader) -> Breaches:
    """Where the first product of attention reads fp8, so does the second: the Softmax's result is quantized too."""
    for softmax, product, _ in _attentions(reader):
        if not all(_is_fp8(reader, product, index) for index in (0, 1)):
            continue
        for second in reader.ends(softmax, (*MOVES, *QDQ)):
            if second.op_type == "MatMul" and not all(_is_fp8(reader, second, index) for index in (0, 1)):
                yield second, f"{title(product)} reads fp8, its own operands are not all fp8"


def _is_fp8(reader: LintReader, node: onnx.NodeProto, index: int) -> bool:
    pair = reader.pair(node, index)
    return pair is not None and reader.codes(pair) == "FLOAT8E4M3FN"


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
