"""Values that are quantized again after they were moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from fxquant.graph.nodes import call_nodes
from fxquant.passes.export.pairs import Pair
from fxquant.passes.export.requantize_moved import RequantizeMoved
from tests.passes.export.written import Written, same_numbers
from tests.passes.graphs import show, untouched

aten = torch.ops.aten
X = torch.tensor([[[1.0], [-2.0]]])


def moved(op: Any, *args: Any, sizes: tuple[int, ...] = (1, 2, 1), quantized: bool = True) -> fx.GraphModule:
    g = Written()
    x = g.input(*sizes)
    value = g.call(op, g.pair(x) if quantized else x, *args)
    return g.done(g.call(aten.neg.default, value), value)


def pairs(gm: fx.GraphModule) -> list[tuple[float, int, str]]:
    found = [pair for node in call_nodes(gm.graph) if (pair := Pair.of(node)) is not None]
    return [(pair.scale, pair.zero_point, pair.label) for pair in found]


def test_snapshot() -> None:
    gm = moved(aten.expand.default, [3, 2, 1])
    assert same_numbers(RequantizeMoved(), gm, X).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
quantize_dequantize_default = quantize_dequantize(x, 0.1, 3, -128, 127, in)
expand_default = expand(quantize_dequantize_default, [3, 2, 1])
quantize_dequantize_default_1 = quantize_dequantize(expand_default, 0.1, 3, -128, 127, in@expand_default)
neg_default = neg(quantize_dequantize_default_1)
return [neg_default, quantize_dequantize_default_1]
""",
    )


def test_through_other_moves() -> None:
    g = Written()
    value = g.call(aten.expand.default, g.call(aten.unsqueeze.default, g.pair(g.input(1, 2, 1)), 0), [4, 1, 2, 1])
    gm = g.done(value)
    assert same_numbers(RequantizeMoved(), gm, X).rewrites == 1
    assert [label for _, _, label in pairs(gm)] == ["in", "in@expand_default"]


def test_a_quantizer_of_its_own_stays_below() -> None:
    g = Written()
    value = g.call(aten.expand.default, g.pair(g.input(1, 2, 1)), [3, 2, 1])
    gm = g.done(g.pair(value, 0.7, "other"))
    assert same_numbers(RequantizeMoved(), gm, X).rewrites == 1
    assert pairs(gm) == [(0.1, 3, "in"), (0.1, 3, "in@expand_default"), (0.7, 3, "other")]


def test_pads_where_the_target_pads_floats() -> None:
    pad = moved(aten.constant_pad_nd.default, [1, 1])
    untouched(RequantizeMoved(), pad)
    assert same_numbers(RequantizeMoved(pads=True), pad, X).rewrites == 1
    untouched(RequantizeMoved(pads=True), moved(aten.constant_pad_nd.default, [1, 1], 2.0))  # which the format may lack


def test_max_pools_over_three_dimensions_where_the_target_runs_them_in_float() -> None:
    volume = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pool = moved(aten.max_pool3d.default, [2, 2, 2], sizes=(1, 2, 4, 4, 4))
    untouched(RequantizeMoved(), pad := moved(aten.constant_pad_nd.default, [1, 1]))
    untouched(RequantizeMoved(pads=True), pool)
    untouched(RequantizeMoved(volume_pools=True), pad)
    assert same_numbers(RequantizeMoved(volume_pools=True), pool, volume).rewrites == 1
    assert [label for _, _, label in pairs(pool)] == ["in", "in@max_pool3d_default"]


@pytest.mark.parametrize(
    "gm",
    [
        moved(aten.transpose.int, 0, 1),
        moved(aten.reshape.default, [2]),
        moved(aten.expand.default, [3, 2, 1], quantized=False),
        moved(aten.mul.Tensor, 2.0),
    ],
    ids=["transpose", "reshape", "float", "arithmetic"],
)
def test_the_runtime_moves_the_others_itself(gm: fx.GraphModule) -> None:
    untouched(RequantizeMoved(pads=True), gm)
