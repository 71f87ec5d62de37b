"""Float products that a runtime would take for one unit with what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from fxquant.passes.export.separate_units import SeparateFloatWeights, SeparateRelu, SeparateSums
from tests.passes.export.written import Written, codes, same_numbers
from tests.passes.graphs import show, untouched

aten = torch.ops.aten


def product(op: Any = aten.matmul.default, *, quantized: bool = False) -> fx.GraphModule:
    g = Written()
    relu = g.call(aten.relu.default, g.call(op, g.input(2, 3), g.input(3, 2)))
    return g.done(g.pair(relu) if quantized else g.call(aten.neg.default, relu))


def test_a_relu_that_no_quantizer_reads() -> None:
    gm = product()
    assert same_numbers(SeparateRelu(), gm, torch.randn(2, 3), torch.randn(3, 2)).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
matmul_default = matmul(x, x1)
maximum_default = maximum(matmul_default, relu_default_least)
neg_default = neg(maximum_default)
return [neg_default]
""",
    )


def test_relus_that_stay() -> None:
    untouched(SeparateRelu(), product(quantized=True))
    g = Written()
    untouched(SeparateRelu(), g.done(g.call(aten.relu.default, g.call(aten.neg.default, g.input(2)))))


def total(*, left: bool = True, constant: bool = False, **given: Any) -> fx.GraphModule:
    """A sum of an integer product and something else, in either order."""
    g = Written()
    x = g.input(2, 3)
    weight = g.weight("w", codes(3, 3), torch.tensor([0.1, 0.2, 0.3]), 1)
    product = g.call(aten.matmul.default, g.pair(x), weight)
    other = g.held("b", torch.tensor([0.3, -0.0, -2.0])) if constant else x
    return g.done(g.call(aten.add.Tensor, *((product, other) if left else (other, product)), **given))


@pytest.mark.parametrize("left", [False, True])
def test_a_sum_of_a_product_and_a_tensor(left: bool) -> None:
    gm = total(left=left)
    assert same_numbers(SeparateSums(), gm, torch.randn(2, 3)).rewrites == 1
    assert show(gm).endswith("""\
neg_default = neg(x)
sub_tensor = sub(matmul_default, neg_default)
return [sub_tensor]
""")


def test_a_sum_of_a_product_and_a_constant() -> None:
    gm = total(constant=True)
    assert same_numbers(SeparateSums(), gm, torch.randn(2, 3)).rewrites == 1
    assert "sub(matmul_default, b_negated)" in show(gm)
    assert torch.equal(gm.get_buffer("b_negated"), torch.tensor([-0.3, 0.0, 2.0]))


def test_a_sum_with_a_factor() -> None:
    gm = total(alpha=2)
    assert same_numbers(SeparateSums(), gm, torch.randn(2, 3)).rewrites == 1
    (difference,) = gm.graph.find_nodes(op="call_function", target=aten.sub.Tensor)
    assert "sub(matmul_default, neg_default)" in show(gm) and difference.kwargs == {"alpha": 2}


def test_a_sum_of_a_product_and_a_number() -> None:
    g = Written()
    x = g.input(2, 3)
    product = g.call(aten.matmul.default, g.pair(x), g.weight("w", codes(3, 3), torch.tensor([0.1, 0.2, 0.3]), 1))
    gm = g.done(g.call(aten.add.Tensor, product, 1.5))
    assert same_numbers(SeparateSums(), gm, torch.randn(2, 3)).rewrites == 1
    assert "sub(matmul_default, -1.5)" in show(gm)


def test_sums_that_stay() -> None:
    untouched(SeparateSums(), total(left=False, alpha=2))  # of twice the product
    g = Written()
    x = g.input(3, 3)
    product = g.call(aten.matmul.default, g.pair(x), g.pair(x, 0.2, "w"))
    untouched(SeparateSums(), g.done(g.call(aten.add.Tensor, product, product)))  # it has two readers
    g = Written()
    x, y = g.input(2, 3), g.input(3, 3)
    untouched(SeparateSums(), g.done(g.call(aten.add.Tensor, g.call(aten.matmul.default, g.pair(x), y), x)))
    g = Written()
    x = g.input(3, 3)
    shared = g.call(aten.matmul.default, g.pair(x), g.pair(x, 0.2, "w"))
    untouched(SeparateSums(), g.done(g.call(aten.add.Tensor, shared, x), shared))


def conv(*, relu: bool = False, reads: str = "pair", weight: str = "float", quantized: bool = True) -> fx.GraphModule:
    g = Written()
    x = g.input(1, 2, 3, 3)
    value = g.call(aten.max_pool2d.default, g.pair(x) if quantized else x, [1, 1])
    held = g.held("w", torch.ones(2, 2, 1, 1)) if weight == "float" else g.weight(
        "w", codes(2, 2, 1, 1), torch.tensor(0.1), None
    )  # fmt: skip
    value = g.call(aten.conv2d.default, value, held)
    if relu:
        value = g.call(aten.relu.default, value)
    if reads == "twice":
        return g.done(g.pair(value, 0.3, "out"), value)
    return g.done(g.pair(value, 0.3, "out") if reads == "pair" else g.call(aten.neg.default, value))


@pytest.mark.parametrize(("relu", "least"), [(False, torch.finfo(torch.float32).min), (True, 0.0)])
def test_a_float_weight_between_quantizers(relu: bool, least: float) -> None:
    gm = conv(relu=relu)
    assert same_numbers(SeparateFloatWeights(), gm, torch.randn(1, 2, 3, 3)).rewrites == 1
    name = "relu_default_least" if relu else "conv2d_default_least"
    assert gm.get_buffer(name).item() == least and gm.get_buffer(name).dim() == 0
    assert f"maximum(conv2d_default, {name})" in show(gm) and "relu(" not in show(gm)


@pytest.mark.parametrize("relu", [False, True])
def test_a_float_weight_and_its_batch_norm(relu: bool) -> None:
    """The exporter makes one convolution of the two, which onnxruntime would quantize as any other."""
    g = Written()
    value = g.call(aten.conv2d.default, g.pair(g.input(1, 2, 3, 3)), g.held("w", torch.ones(2, 2, 1, 1)))
    mean, var = g.held("mean", torch.tensor([0.5, -1.0])), g.held("var", torch.tensor([2.0, 0.5]))
    value = g.call(aten.batch_norm.default, value, None, None, mean, var, False, 0.1, 1e-5, False)
    value = g.call(aten.relu.default, value) if relu else value
    gm = g.done(g.pair(value, 0.3, "out"))
    assert same_numbers(SeparateFloatWeights(), gm, torch.randn(1, 2, 3, 3)).rewrites == 1
    name = "relu_default_least" if relu else "batch_norm_default_least"
    assert f"maximum(batch_norm_default, {name})" in show(gm) and "relu(" not in show(gm)


@pytest.mark.parametrize(
    "gm",
    [
        *(conv(reads="neg"), conv(reads="neg", relu=True), conv(reads="twice")),
        *(conv(weight="integer"), conv(quantized=False)),
    ],
    ids=["no quantizer after", "none after its relu", "two readers", "an integer weight", "a float input"],
)
def test_weights_that_stay(gm: fx.GraphModule) -> None:
    untouched(SeparateFloatWeights(), gm)
