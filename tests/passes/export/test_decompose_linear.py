"""Products with integer weights as MatMul and Add."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from fxquant.graph.nodes import call_nodes
from fxquant.ops.qdq import DEQUANTIZE
from fxquant.passes.export.decompose_linear import DecomposeAddmm, DecomposeLinear
from tests.passes.export.written import Written, codes, same_numbers
from tests.passes.graphs import apply, show, untouched

aten = torch.ops.aten
X = torch.tensor([[1.0, -2.0, 0.5, 4.0], [0.25, 3.0, -1.0, 8.0]])
BIAS = torch.tensor([1.0, -0.5, 2.0])


def linear(scale: Tensor, axis: int | None, *block: int, bias: str = "in place") -> fx.GraphModule:
    g = Written()
    x = g.input(2, 4)
    weight = g.weight("w", codes(3, 4), scale, axis, *block)
    if bias == "none":
        return g.done(g.call(aten.linear.default, x, weight))
    held = g.held("b", BIAS) if bias != "computed" else g.call(aten.mul.Tensor, g.held("b", BIAS), 2.0)
    given = {"bias": held} if bias == "keyword" else {}
    return g.done(g.call(aten.linear.default, x, weight, *(() if given else (held,)), **given))


def held(gm: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The constants that are read, with their sizes."""
    return {str(n.target): tuple(getattr(gm, str(n.target)).shape) for n in gm.graph.nodes if n.op == "get_attr"}


def test_snapshot() -> None:
    gm = linear(torch.tensor([0.5, 0.25, 1.0]), 0)
    assert same_numbers(DecomposeLinear(), gm, X).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
dequantize_affine_default_1 = dequantize(w__codes_t, w__s, w__z, 1)
matmul_default = matmul(x, dequantize_affine_default_1)
add_tensor = add(matmul_default, b)
return [add_tensor]
""",
    )
    assert held(gm) == {"w__codes_t": (4, 3), "w__s": (3,), "w__z": (3,), "b": (3,)}
    assert gm.get_buffer("w__codes_t").is_contiguous()


def test_a_bias_apart() -> None:
    gm = linear(torch.tensor([0.5, 0.25, 1.0]), 0)
    assert same_numbers(DecomposeLinear(bias_apart=True), gm, X).rewrites == 1
    assert "sub(matmul_default, b_negated)" in show(gm) and torch.equal(gm.get_buffer("b_negated"), -BIAS)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bias", ["in place", "keyword", "computed", "none"])
def test_every_way_to_write_a_bias(bias: str, apart: bool) -> None:
    gm = linear(torch.tensor(0.5), None, bias=bias)
    assert same_numbers(DecomposeLinear(bias_apart=apart), gm, X).rewrites == 1
    names = [node.target._overloadname for node in call_nodes(gm.graph)]  # type: ignore[union-attr]
    assert ("neg(" in show(gm)) == (apart and bias == "computed") and names


def test_blocks_turn_with_their_weight() -> None:
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0], [4.0, 0.125]])
    gm = linear(scale, 1, 2)
    assert same_numbers(DecomposeLinear(), gm, X).rewrites == 1
    (weight,) = (node for node in call_nodes(gm.graph) if node.target is DEQUANTIZE)
    assert weight.args[3:] == (0, 2) and held(gm)["w__s_t"] == (2, 3)


def test_a_float_weight_stays() -> None:
    g = Written()
    gm = g.done(g.call(aten.linear.default, g.input(2, 4), g.held("w", torch.ones(3, 4))))
    untouched(DecomposeLinear(), gm)
    untouched(DecomposeAddmm(), gm)


def addmm(bias: str = "held", **factors: float) -> fx.GraphModule:
    g = Written()
    x = g.input(2, 4)
    weight = g.weight("w", codes(4, 3), torch.tensor(0.5), None)
    first = g.held("b", BIAS) if bias == "held" else g.call(aten.mul.Tensor, g.held("b", BIAS), 2.0)
    return g.done(g.call(aten.addmm.default, first, x, weight, **factors))


def test_addmm() -> None:
    gm = addmm()
    assert apply(DecomposeAddmm(), gm).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
dequantize_affine_default = dequantize(w__codes, w__s, w__z, None)
matmul_default = matmul(x, dequantize_affine_default)
add_tensor = add(matmul_default, b)
return [add_tensor]
""",
    )
    weight = codes(4, 3).double() * 0.5
    torch.testing.assert_close(gm(X)[0].double(), X.double() @ weight + BIAS, rtol=0, atol=1e-4)
    assert "sub(" in show_after(DecomposeAddmm(bias_apart=True), addmm())
    assert "add(" in show_after(DecomposeAddmm(), addmm(alpha=1, beta=1))


def show_after(each: DecomposeAddmm, gm: fx.GraphModule) -> str:
    apply(each, gm)
    return show(gm)


def test_addmm_of_a_tensor_where_a_float_gemm_would_come_of_it() -> None:
    assert "neg(" in (text := show_after(DecomposeAddmm(bias_apart=True), addmm("computed"))) and "sub(" in text


@pytest.mark.parametrize("gm", [addmm("computed"), addmm(alpha=2), addmm(beta=0.5)])
def test_sums_of_products_and_factors_stay(gm: fx.GraphModule) -> None:
    untouched(DecomposeAddmm(), gm)
    untouched(DecomposeLinear(), gm)
