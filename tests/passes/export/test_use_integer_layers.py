"""Codes with scales that are state, integer layers, weights of 4 bits."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from fxquant.errors import ExportError
from fxquant.passes.base import run_all
from fxquant.passes.export.hold_scales import HoldScales
from fxquant.passes.export.integer_layers import IntegerLayer
from fxquant.passes.export.pack_codes import PackCodes
from fxquant.passes.export.use_integer_layers import Integers, UseIntegerLayers
from tests.passes.export.written import Written, codes, same_numbers
from tests.passes.graphs import apply, show

aten = torch.ops.aten
X = torch.arange(24).reshape(2, 3, 4) * 0.1 - 1.17
SCALES = torch.tensor([0.5, 0.25])


def layers(*, low: int = -128, high: int = 127) -> fx.GraphModule:
    """Two linear layers, the first with a ReLU and a quantized result."""
    g = Written()
    x = g.input(2, 3, 4)
    first = g.call(aten.linear.default, g.pair(x), g.weight("a", codes(2, 4), SCALES, 0), g.held("bias", SCALES))
    pair = torch.ops.fxquant.quantize_dequantize.default
    second = g.call(pair, g.call(aten.relu.default, first), 0.37, low, low, high, "b.input")
    return g.done(g.call(aten.linear.default, second, g.weight("b", codes(2, 2), torch.tensor(0.5), None)))


def test_scales_are_state() -> None:
    gm = layers()
    assert same_numbers(HoldScales(), gm, X).rewrites == 2
    assert_expected_inline(show(gm), """\
quantize_per_tensor_tensor_qparams = quantize_per_tensor(x, in__scale, in__zero_point, 0, 255, torch.uint8)
dequantize_per_tensor_tensor_qparams = dequantize_per_tensor(quantize_per_tensor_tensor_qparams, in__scale, in__zero_point)
dequantize_affine_default = dequantize(a__codes, a__s, a__z, 0)
linear_default = linear(dequantize_per_tensor_tensor_qparams, dequantize_affine_default, bias)
relu_default = relu(linear_default)
quantize_per_tensor_tensor_qparams_1 = quantize_per_tensor(relu_default, b__input__scale, b__input__zero_point, 0, 255, torch.uint8)
dequantize_per_tensor_tensor_qparams_1 = dequantize_per_tensor(quantize_per_tensor_tensor_qparams_1, b__input__scale, b__input__zero_point)
dequantize_affine_default_1 = dequantize(b__codes, b__s, b__z, None)
linear_default_1 = linear(dequantize_per_tensor_tensor_qparams_1, dequantize_affine_default_1)
return [linear_default_1]
""")  # noqa: E501


def test_layers_read_codes_and_give_codes() -> None:
    gm = layers()
    (before,) = gm(X)
    HoldScales().run(gm)
    result = apply(UseIntegerLayers(), gm)
    assert result.rewrites == 2
    assert result.product(Integers).layers == ["linear_default_layer", "linear_default_1_layer"]
    assert_expected_inline(show(gm), """\
quantize_per_tensor_tensor_qparams = quantize_per_tensor(x, in__scale, in__zero_point, 0, 255, torch.uint8)
linear_default_layer = linear_default_layer(quantize_per_tensor_tensor_qparams, in__scale, in__zero_point)
linear_default_1_layer = linear_default_1_layer(linear_default_layer, b__input__scale, b__input__zero_point)
return [linear_default_1_layer]
""")
    torch.testing.assert_close(gm(X)[0], before)


def test_a_grid_of_fewer_codes_is_no_kernel_s_result() -> None:
    gm = layers(low=-8, high=7)
    (before,) = gm(X)
    run_all((HoldScales(), UseIntegerLayers()), gm)
    assert gm.linear_default_layer.output_scale is None
    torch.testing.assert_close(gm(X)[0], before)


@pytest.mark.parametrize("op", ["addmm", "mm", "transposed", "convolution"])
def test_other_forms_of_a_layer(op: str) -> None:
    g = Written()
    x = g.pair(g.input(2, 4) if op != "convolution" else g.input(2, 4, 5))
    if op == "addmm":
        y = g.call(aten.addmm.default, g.held("bias", SCALES), x, g.weight("a", codes(4, 2), SCALES, 1))
    elif op == "mm":
        y = g.call(aten.mm.default, x, g.weight("a", codes(4, 2), torch.tensor(0.5), None))
    elif op == "transposed":
        y = g.call(aten.matmul.default, x, g.call(aten.t.default, g.weight("a", codes(2, 4), SCALES, 0)))
    else:
        where = (None, [2], [1], [1], False, [0], 2)
        y = g.call(aten.convolution.default, x, g.weight("a", codes(2, 2, 3), SCALES, 0), *where)
    gm, value = g.done(y), torch.arange(40).reshape(2, 4, 5) * 0.05 - 1.0
    value = value if op == "convolution" else value[..., 0]
    (before,) = gm(value)
    assert run_all((HoldScales(), UseIntegerLayers()), gm).rewrites == 2
    assert isinstance(next(gm.children()), IntegerLayer)
    torch.testing.assert_close(gm(value)[0], before)


def declined(kind: str) -> fx.GraphModule:
    g = Written()
    x = g.input(2, 4)
    pair = g.pair(x)
    weight = g.weight("a", codes(2, 4), SCALES, 0)
    if kind == "float input":
        return g.done(g.call(aten.linear.default, x, weight))
    if kind == "float weight":
        return g.done(g.call(aten.linear.default, pair, g.held("w", torch.ones(2, 4))))
    if kind == "activations":
        return g.done(g.call(aten.matmul.default, pair, g.call(aten.t.default, g.pair(x, label="other"))))
    if kind == "inner scales":
        return g.done(g.call(aten.linear.default, pair, g.weight("b", codes(2, 4), torch.ones(4), 1)))
    if kind == "groups":
        return g.done(g.call(aten.linear.default, pair, g.weight("b", codes(2, 4), torch.ones(2, 2), 1, 2)))
    if kind == "computed bias":
        return g.done(g.call(aten.linear.default, pair, weight, g.call(aten.select.int, x, 1, 0)))
    if kind == "wide":
        wide = g.call(torch.ops.fxquant.quantize_dequantize.default, x, 0.5, 0, -512, 511, "in")
        return g.done(g.call(aten.linear.default, wide, weight))
    turned = g.weight("b", codes(4, 2), SCALES, 1)
    return g.done(g.call(aten.addmm.default, g.held("bias", SCALES), pair, turned, beta=2))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("float input", "its input is not quantized"),
        ("float weight", "its weight is not quantized"),
        ("activations", "torch has no product of two integer activations"),
        ("inner scales", "its weight has a scale for each element of its sums"),
        ("groups", "its weight has a scale for each group"),
        ("computed bias", "its bias is not one constant for each channel"),
        ("wide", "the codes of its input have more than 8 bits"),
        ("scaled", "it is scaled by alpha or beta"),
    ],
)
def test_declines(kind: str, reason: str) -> None:
    gm = declined(kind)
    HoldScales().run(gm)
    result = UseIntegerLayers().run(gm)
    assert result.rewrites == 0
    (decline,) = result.declines
    assert decline.reason == f"{decline.node} stays a float product: {reason}"


@pytest.mark.parametrize("axis", [0, None])
def test_four_bits_are_packed(axis: int | None) -> None:
    g = Written()
    x = g.input(2, 3)
    small = (codes(2, 3) % 15 - 7).to(torch.int8)
    scale = torch.tensor([0.5, 0.25]) if axis == 0 else torch.tensor(0.5)
    gm = g.done(g.call(aten.linear.default, x, g.weight("a", small, scale, axis)))
    assert same_numbers(PackCodes(int4=frozenset({"a__codes"})), gm, X[0, :2, :3]).rewrites == 1
    assert [value.shape for value in gm.buffers() if value.dtype == torch.uint8] == [(2, 2)]
    assert PackCodes().run(gm).rewrites == 0


@pytest.mark.parametrize("element", [None, "e4m3"])
def test_other_formats_are_refused_by_name(element: str | None) -> None:
    g = Written()
    x = g.input(2, 4)
    if element is None:
        format = (-1, -127, 127, True, None, None, None)
        g.done(g.call(torch.ops.fxquant.quantize_dequantize_blocks.default, x, *format, "a.input"))
    else:
        wide = (0.5, 0, -448, 448, "a.input")
        g.done(g.call(torch.ops.fxquant.quantize_dequantize.default, x, *wide, element=element))
    what = "scales of tokens or blocks" if element is None else "codes of e4m3"
    with pytest.raises(ExportError, match=f"a.input must have a format that integer kernels multiply: got {what}"):
        HoldScales().run(g.gm)
