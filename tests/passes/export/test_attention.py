"""Attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant.passes.export.decompose_attention import DecomposeAttention
from tests.passes.export.written import Written
from tests.passes.graphs import apply, show, untouched

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SIZES = (2, 4, 16)


def attention(mask: torch.dtype | None = None, heads: int = 2, keyword: bool = False, **given: Any) -> fx.GraphModule:
    g = Written()
    q, k, v = (g.input(1, n, 4, 16) for n in (heads, 2, 2))
    if mask is not None:
        given["attn_mask"] = g.input(4, 4, dtype=mask)
    if keyword:
        return g.done(g.call(SDPA, q, key=k, value=v, **given))
    return g.done(g.call(SDPA, q, k, v, **given))


def inputs(mask: torch.dtype | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    found = [torch.randn(1, 2, 4, 16) for _ in range(3)]
    if mask is not None:
        found.append(torch.randn(4, 4) if mask.is_floating_point else torch.ones(4, 4).tril().bool())
    return found


def test_snapshot() -> None:
    gm = attention()
    assert apply(DecomposeAttention(), gm).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
transpose_int = transpose(x1, -2, -1)
matmul_default = matmul(x, transpose_int)
mul_tensor = mul(matmul_default, 0.25)
softmax_int = softmax(mul_tensor, -1)
matmul_default_1 = matmul(softmax_int, x2)
return [matmul_default_1]
""",
    )


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (None, {}),
        (None, {"scale": 0.5}),
        (None, {"is_causal": True}),
        (torch.bool, {}),
        (torch.float32, {}),
        (None, {"keyword": True}),
        (None, {"dropout_p": 0.0, "enable_gqa": False}),
    ],
)
def test_its_numbers_are_torchs(mask: torch.dtype | None, given: dict[str, Any]) -> None:
    gm, values = attention(mask, **given), inputs(mask)
    (expected,) = gm(*(value.double() if value.is_floating_point() else value for value in values))
    assert apply(DecomposeAttention(), gm).rewrites == 1
    torch.testing.assert_close(gm(*values)[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gm", "reason"),
    [(attention(heads=4, enable_gqa=True), "grouped queries"), (attention(dropout_p=0.5), "dropout is on")],
)
def test_declined(gm: fx.GraphModule, reason: str) -> None:
    (decline,) = untouched(DecomposeAttention(), gm).declines
    assert decline.reason == f"attention left to the exporter: {reason}"
    assert decline.node.startswith("scaled_dot_product_attention")


def test_a_head_of_symbolic_size() -> None:
    gm = attention()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 4)
    query = mode.from_tensor(torch.randn(1, 2, 4, 16), symbolic_context=context)
    gm.graph.find_nodes(op="placeholder")[0].meta["val"] = query
    (decline,) = untouched(DecomposeAttention(), gm).declines
    assert decline.reason == "attention left to the exporter: the head size is symbolic"


@pytest.mark.parametrize("made", ["held", "positions", "zeros"])
def test_a_mask_that_masks_nothing_is_left_out(made: str) -> None:
    g = Written()
    q, k, v = (g.input(1, 2, 4, 16) for _ in range(3))
    if made == "positions":  # as transformers writes it
        row = g.call(aten.unsqueeze.default, g.call(aten.add.Tensor, g.call(aten.arange.default, 4), 0), 1)
        mask = g.call(aten.ge.Scalar, row, 0)
    else:
        mask = g.held("mask", torch.ones(4, 4).bool() if made == "held" else torch.zeros(1, 4))
    size = g.call(aten.sym_size.int, q, 0)
    gm = g.done(g.call(SDPA, q, k, v, g.call(aten.expand.default, mask, [size, 2, 4, 4])))
    (expected,) = gm(*inputs())
    assert apply(DecomposeAttention(), gm).rewrites == 1
    assert "masked_fill" not in show(gm) and "add_tensor_1" not in show(gm)
    torch.testing.assert_close(gm(*inputs())[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["one False", "of the input", "random", "padded", "written"])
def test_a_mask_that_may_mask_stays(how: str) -> None:
    g = Written()
    q, k, v = (g.input(1, 2, 4, 16) for _ in range(3))
    allowed = torch.ones(1, 2, 4, 4).bool()
    allowed[0, 0, 0, 3] = how != "one False"
    mask, near = g.held("mask", allowed), g.call(aten.ge.Scalar, g.call(aten.slice.Tensor, q, -1, 0, 4), -9.0)
    if how == "of the input":
        mask = near
    if how == "random":
        mask = g.call(aten.ge.Scalar, g.call(aten.rand_like.default, g.held("like", torch.ones(4, 4))), -1.0)
    if how == "padded":
        mask = g.call(aten.constant_pad_nd.default, g.held("less", torch.ones(4, 3).bool()), [0, 1])
    if how == "written":
        g.call(aten.copy_.default, mask, near)
    gm = g.done(g.call(SDPA, q, k, v, mask))
    assert apply(DecomposeAttention(), gm).rewrites == 1
    assert "masked_fill" in show(gm)
