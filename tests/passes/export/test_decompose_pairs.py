"""Pairs and weights in the operators of PT2E."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from fxquant.errors import ExportError
from fxquant.passes.base import Pass
from fxquant.passes.export.decompose_pairs import KEY, DecomposePairs, FloatWeights
from fxquant.passes.export.quantize_at_products import QuantizeAtProducts, QuantizeResults
from tests.passes.export.written import Written, codes, same_numbers
from tests.passes.graphs import apply, show

aten = torch.ops.aten
# Between ties by far: torch's operator multiplies by the reciprocal, and gives the same codes.
X = torch.arange(24).reshape(2, 3, 4) * 0.1 - 1.17
SCALES = torch.tensor([0.5, 0.25])


def layers(*, relu: bool = True, low: int = -128) -> fx.GraphModule:
    """Two linear layers, the second without a quantized result."""
    g = Written()
    x = g.input(2, 3, 4)
    first = g.call(aten.linear.default, g.pair(x), g.weight("a", codes(2, 4), SCALES, 0))
    first = g.call(aten.relu.default, first) if relu else first
    pair = g.call(torch.ops.fxquant.quantize_dequantize.default, first, 0.5, 128 + low, low, low + 255, "b.input")
    return g.done(g.call(aten.linear.default, pair, g.weight("b", codes(2, 2), torch.tensor(0.5), None)))


def test_snapshot() -> None:
    gm = layers()
    assert same_numbers(DecomposePairs(), gm, X).rewrites == 4
    assert_expected_inline(show(gm), """\
quantize_per_tensor_default = quantize_per_tensor(x, 0.1, 3, -128, 127, torch.int8)
dequantize_per_tensor_default = dequantize_per_tensor(quantize_per_tensor_default, 0.1, 3, -128, 127, torch.int8)
dequantize_per_channel_default = dequantize_per_channel(a__codes, a__s, a__z_int64, 0, -128, 127, torch.int8)
linear_default = linear(dequantize_per_tensor_default, dequantize_per_channel_default)
relu_default = relu(linear_default)
quantize_per_tensor_default_1 = quantize_per_tensor(relu_default, 0.5, 0, -128, 127, torch.int8)
dequantize_per_tensor_default_1 = dequantize_per_tensor(quantize_per_tensor_default_1, 0.5, 0, -128, 127, torch.int8)
dequantize_per_tensor_default_2 = dequantize_per_tensor(b__codes, 0.5, 0, -128, 127, torch.int8)
linear_default_1 = linear(dequantize_per_tensor_default_1, dequantize_per_tensor_default_2)
return [linear_default_1]
""")
    assert [n.meta[KEY] for n in gm.graph.nodes if KEY in n.meta] == ["in", "b.input"]


@pytest.mark.parametrize("low", [-128, 0])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8])
def test_codes_move_to_a_type_and_values_stay(low: int, kind: torch.dtype) -> None:
    gm = layers(low=low)
    same_numbers(DecomposePairs(activations=kind), gm, X)
    assert {n.args[5] for n in gm.graph.nodes if n.name.startswith("quantize_per_tensor")} == {kind}


def test_an_int32_bias_is_float_values() -> None:
    g = Written()
    x = g.input(2, 3, 4)
    bias = g.weight("bias", torch.tensor([100, -7], dtype=torch.int32), SCALES, 0)
    gm = g.done(g.call(aten.linear.default, g.pair(x), g.weight("a", codes(2, 4), SCALES, 0), bias))
    same_numbers(DecomposePairs(), gm, X)
    assert torch.equal(gm.bias__codes_values, torch.tensor([50.0, -1.75]))


def without(what: str) -> fx.GraphModule:
    g = Written()
    x = g.input(2, 4)
    if what == "groups":
        return g.done(g.call(aten.linear.default, x, g.weight("a.weight", codes(2, 4), torch.ones(2, 2), 1, 2)))
    if what == "blocks":
        blocks = torch.ops.fxquant.quantize_dequantize_blocks.default
        return g.done(g.call(blocks, x, -1, -127, 127, True, None, None, None, "a.input"))
    wide = {"float": (-448, 448, "a.input"), "wide": (-512, 511, "a.input")}[what]
    element = {"element": "e4m3"} if what == "float" else {}
    return g.done(g.call(torch.ops.fxquant.quantize_dequantize.default, x, 0.5, 0, *wide, **element))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("groups", r"a__weight__codes must have a format that quantized_decomposed has: got weights with a scale"),
        ("blocks", r"a\.input must have a format .*: got scales of tokens or blocks of an activation"),
        ("float", r"a\.input must have a format .*: got codes of e4m3\. Prepare with recipe 'int8'"),
        ("wide", r"a\.input must have a format .*: got codes from -512 to 511 in torch\.int8"),
    ],
)
def test_what_has_no_operator(what: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        DecomposePairs().run(without(what))


# ---------------------------------------------------------------- products with a float result


@pytest.mark.parametrize("relu", [True, False])
def test_a_weight_is_float_where_its_product_is(relu: bool) -> None:
    gm = layers(relu=relu)
    result = same_numbers(FloatWeights(), gm, X)
    assert [each.reason for each in result.declines] == [
        "the result of its product is not quantized, and the runtime's kernels give integers"
    ]
    (left,) = (n for n in gm.graph.nodes if n.target is torch.ops.fxquant.dequantize_affine.default)
    assert left.args[0].target == "a__codes"


def test_one_float_reader_is_enough() -> None:
    g = Written()
    x = g.input(2, 3, 4)
    product = g.call(aten.linear.default, g.pair(x), g.weight("a", codes(2, 4), SCALES, 0))
    gm = g.done(g.pair(product, label="out"), product)
    assert same_numbers(FloatWeights(), gm, X).rewrites == 1


# ---------------------------------------------------------------- pairs at products


def moved(also: bool) -> fx.GraphModule:
    """A pair, a flatten, a linear layer; the pair is read by another."""
    g = Written()
    x = g.input(2, 3, 4)
    pair = g.pair(x)
    flat = g.call(aten.flatten.using_ints, pair, 1)
    product = g.call(aten.linear.default, flat, g.weight("a", codes(2, 12), SCALES, 0))
    return g.done(product, *([g.call(aten.neg.default, pair)] if also else []))


def test_a_pair_moves_to_the_product() -> None:
    gm = moved(also=False)
    assert same_numbers(QuantizeAtProducts(), gm, X).rewrites == 1
    assert_expected_inline(show(gm), """\
flatten_using_ints = flatten(x, 1)
quantize_dequantize_default_1 = quantize_dequantize(flatten_using_ints, 0.1, 3, -128, 127, in@flatten_using_ints)
dequantize_affine_default = dequantize(a__codes, a__s, a__z, 0)
linear_default = linear(quantize_dequantize_default_1, dequantize_affine_default)
return [linear_default]
""")


def test_a_pair_that_others_read_stays() -> None:
    gm = moved(also=True)
    assert same_numbers(QuantizeAtProducts(), gm, X).rewrites == 1
    assert show(gm).count("quantize_dequantize") >= 2 and "neg(quantize_dequantize" in show(gm)


def test_nothing_to_move() -> None:
    gm = layers()
    assert apply(QuantizeAtProducts(), gm).rewrites == 0


def test_they_are_one_after_the_other() -> None:
    gm = moved(also=False)
    expected: Tensor = gm(X)[0]
    passes: tuple[Pass, ...] = (QuantizeAtProducts(), DecomposePairs())
    for each in passes:
        each.run(gm)
    assert torch.equal(gm(X)[0], expected)


@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_a_result_is_quantized_before_it_is_moved_where_its_readers_agree(scale: float) -> None:
    g = Written()
    x = g.input(2, 3, 4)
    product = g.call(aten.linear.default, g.pair(x), g.weight("a", codes(2, 4), SCALES, 0))
    turned = g.call(aten.transpose.int, g.call(aten.relu.default, product), 1, 2)
    gm = g.done(g.pair(turned, label="a"), g.pair(turned, scale=scale, label="b"))
    assert same_numbers(QuantizeResults(), gm, X).rewrites == (scale == 0.1)
    assert ("transpose(quantize_dequantize" in show(gm)) == (scale == 0.1)
