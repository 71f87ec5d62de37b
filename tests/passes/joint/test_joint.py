"""A joint graph read once: what belongs to forward, what backward wants of it, and what backward has anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops import fake_quantize
from fxquant.passes.joint.joint import Joint

aten = torch.ops.aten
X, W, T = torch.ones(4, 8), torch.ones(8, 8), torch.ones(4, 8)
ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def joint(step: Callable[..., object], *args: Tensor) -> Joint:
    return Joint(make_fx(step, tracing_mode="fake")(*args).graph)


def names(nodes: object) -> set[str]:
    """Of calls, without their overloads."""
    return {n.name for n in nodes if n.op == "call_function"}  # type: ignore[attr-defined]


def linear(x: Tensor, w: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """``relu(x @ w)``, and what could be its gradients."""
    hidden = aten.mm(x, w)
    masked = aten.mul(tangents, aten.sign(hidden))
    return aten.relu(hidden), aten.mm(masked, aten.t(w)), aten.mm(aten.t(x), masked)


def test_halves_of_a_step() -> None:
    found = joint(linear, X, W, T)
    assert names(found.forward) == {"mm", "relu"}
    assert [node.name for node in found.only_backward()] == ["sign", "mul", "t", "mm_1", "t_1", "mm_2"]
    assert [str(node.target) for node in found.tangents] == ["tangents_1"]
    assert names(found.after_tangents) == {"mul", "mm_1", "mm_2"}, "sign and the turned operands run in backward too"


def test_a_graph_without_a_backward() -> None:
    found = joint(lambda x, w: aten.relu(aten.mm(x, w)), X, W)
    assert names(found.forward) == {"mm", "relu"} and not found.tangents and not list(found.only_backward())


def test_what_is_written_before_the_tangents_belongs_to_forward() -> None:
    """A running statistic is no output, and nothing reads it."""

    def step(x: Tensor, mean: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        aten.copy_(mean, aten.mul(aten.sum(x, [0]), 0.1))
        aten.copy_(tangents, aten.neg(tangents))
        return aten.neg(x), tangents

    found = joint(step, X, torch.ones(8), T)
    assert names(found.forward) == {"sum_1", "mul", "copy_", "neg_1"}
    assert [node.name for node in found.only_backward()] == ["neg", "copy__1"]


def nobody(node: fx.Node) -> bool:
    return False


def test_backward_wants_what_it_reads_or_can_make_of_it() -> None:
    found = joint(linear, X, W, T)
    wanted = found.wanted(nobody)
    assert {node.name for node in wanted} == {"mm", "x_1", "w_1"}
    assert {node.name for node in found.wanted(lambda node: node.name == "sign")} == {"x_1", "w_1"}


def test_pointwise_values_are_made_again_from_what_they_read() -> None:
    def step(x: Tensor, w: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        value = aten.tanh(aten.mul(aten.mm(x, w), 2))
        return value, aten.mul(tangents, value)

    found = joint(step, X, W, T)
    assert {node.name for node in found.wanted(nobody)} == {"tanh", "mul", "mm"}, "and no further than the product"


def quantized(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """``fq(x · 2) @ w`` and both gradients."""
    value = aten.mul(x, 2)
    codes = fake_quantize.PER_TENSOR(value, scale, zero, 0, 255, rounding="divide")
    back = fake_quantize.PER_TENSOR_BACKWARD(
        aten.mm(tangents, aten.t(w)), value, scale, zero, 0, 255, rounding="divide"
    )
    return aten.mm(codes, w), aten.mul(back, 2), aten.mm(aten.t(codes), tangents)


def test_a_fake_quants_input_is_no_reason_to_keep_it() -> None:
    found = joint(quantized, X, W, ONE, ZERO, T)
    wanted = {node.name for node in found.wanted(nobody)}
    assert "fake_quantize_per_tensor_affine" in "".join(wanted) and "mul" not in wanted
    assert {"w_1", "scale_1", "zero_1"} <= wanted, "its scale is read as it is"


def test_what_backward_has_anyway() -> None:
    """Inputs, what it wants, and what is pointwise of those; a fake-quant never, a product only if it is wanted."""

    def step(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        first = aten.mul(x, 3)
        product = aten.mm(first, w)
        late = aten.relu(product)
        rounded = fake_quantize.PER_TENSOR(late, scale, zero, 0, 255)
        return aten.add(rounded, 1), tangents

    found = joint(step, X, W, ONE, ZERO, T)
    assert {node.op for node in found.kept(set())} == {"placeholder", "call_function"}
    assert names(found.kept(set())) == {"mul"}
    (product,) = (node for node in found.graph.nodes if node.target is aten.mm.default)
    assert names(found.kept({product})) == {"mul", "mm", "relu"}
    (rounded,) = (node for node in found.graph.nodes if "fake_quantize" in node.name)
    assert rounded not in found.kept({rounded}) and "add" not in names(found.kept({rounded}))


def test_a_pointwise_value_needs_all_that_it_reads_but_small_things() -> None:
    def step(x: Tensor, w: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        product = aten.mm(x, w)
        small = aten.sum(product, [0, 1])
        return aten.mul(x, small), aten.mul(x, product), tangents

    found = names(joint(step, X, W, T).kept(set()))
    assert "mul" in found and "mul_1" not in found
