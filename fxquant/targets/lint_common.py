"""The lint rules for every target: what any reader of QuantizeLinear / DequantizeLinear needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxquant.support.require import require
from fxquant.targets.lint_reader import MOVES, PRODUCTS, QDQ, Breaches, LintReader, Rules, attribute, title

if TYPE_CHECKING:
    import onnx

COMMON = Rules()


@COMMON.add
def _opset_is_read(reader: LintReader) -> Breaches:
    """The opset is one that the target reads."""
    if reader.opset > reader.profile.highest_opset:
        yield (
            None,
            f"opset {reader.opset} is beyond {reader.profile.highest_opset}, the highest for {reader.profile.name}",
        )


@COMMON.add
def _blocks_have_their_opset(reader: LintReader) -> Breaches:
    """Scales per block, and 4-bit integers, are in the standard from opset 21 on."""
    for node in reader.of(*QDQ) if reader.opset < 21 else ():
        what = "scales per block" if attribute(node, "block_size") else f"{(reader.codes(node) or '').lower()} codes"
        if attribute(node, "block_size") or reader.codes(node) in ("INT4", "UINT4"):
            yield node, f"it has {what} in opset {reader.opset}: they want 21"


@COMMON.add
def _scale_is_positive(reader: LintReader) -> Breaches:
    """Scales are constant, finite and above 0; of tokens and groups computed ones, for a target that takes them."""
    np = require("numpy")
    computed = reader.profile.families is None or "token" in reader.profile.families
    for node in reader.of(*QDQ):
        if node.input[1] not in reader.constants:
            of_groups = computed and attribute(node, "axis") is not None
            if not of_groups and not reader.is_dynamic(node.input[1]):
                yield node, "its scale is computed at run time"
            continue
        scale = reader.array(node, 1)
        if scale is not None:
            wide = np.asarray(scale, dtype=np.float32)
            if not (np.isfinite(wide).all() and (wide > 0).all()):
                yield node, f"its scale must be finite and above 0: got {wide.min():g} to {wide.max():g}"


@COMMON.add
def _zero_point_is_given(reader: LintReader) -> Breaches:
    """The type of codes is said: by a zero point with the scale's shape, or as ``output_dtype``; floats say it.

    A DequantizeLinear of a QuantizeLinear's codes has their type.
    """
    for node in reader.of(*QDQ):
        if len(node.input) < 3 or not node.input[2]:
            quantize = node if node.op_type == "QuantizeLinear" else reader.producer.get(node.input[0])
            said = quantize is not None and (attribute(quantize, "output_dtype") or "".join(quantize.input[2:]))
            if not said and not (reader.codes(node) or "").startswith("FLOAT"):
                yield node, "it has no zero point: the type of its codes is left to the reader"
            continue
        scale, point = reader.shape(node.input[1]), reader.shape(node.input[2])
        if scale is not None and point is not None and scale != point:
            yield node, f"scale and zero point differ in shape: {scale} and {point}"


@COMMON.add
def _axis_is_given(reader: LintReader) -> Breaches:
    """Scales per channel or block name their axis: the default is 1 in ONNX and read as 0 elsewhere."""
    for node in reader.of(*QDQ):
        count = math.prod(reader.shape(node.input[1]) or ())
        if count > 1 and attribute(node, "axis") is None:
            yield node, f"it has {count} scales and no axis"


@COMMON.add
def _scale_fits_the_axis(reader: LintReader) -> Breaches:
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


@COMMON.add
def _one_quantizer_per_tensor(reader: LintReader) -> Breaches:
    """A tensor has one QuantizeLinear, and no codes are quantized again."""
    seen: dict[str, onnx.NodeProto] = {}
    for node in reader.of("QuantizeLinear"):
        if node.input[0] in seen:
            yield node, f"its input is quantized by {title(seen[node.input[0]])} too"
        seen.setdefault(node.input[0], node)
        if reader.pair(node, 0, ()) is not None:
            yield node, "it quantizes what was just dequantized"


@COMMON.add
def _batch_norm_is_folded(reader: LintReader) -> Breaches:
    """No BatchNormalization follows a quantized convolution."""
    for node in reader.of("BatchNormalization"):
        head = reader.source(node, 0)
        if head is not None and head.op_type in ("Conv", "ConvTranspose") and reader.pair(head, 1) is not None:
            yield node, f"it stands after {title(head)}, whose weight is quantized unfolded"


@COMMON.add
def _operands_go_together(reader: LintReader) -> Breaches:
    """Where one operand of a product is quantized, so is the other; a weight alone may be."""
    through = (*MOVES, *reader.lint.misplaced)
    for node in reader.of(*PRODUCTS):
        pairs = [reader.pair(node, index, through) for index in (0, 1)]
        for index, pair in enumerate(pairs):
            if pair is not None and not reader.is_weight(pair) and pairs[1 - index] is None:
                yield node, f"operand {index} is quantized, operand {1 - index} is not"


@COMMON.add
def _weight_axis_is_the_output_channel(reader: LintReader) -> Breaches:
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
