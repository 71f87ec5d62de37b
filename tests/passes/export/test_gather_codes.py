"""Tables that are looked up before they are dequantized."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from fxquant.passes.export.gather_codes import GatherCodes
from tests.passes.export.written import Written, codes, same_numbers
from tests.passes.graphs import show, untouched

aten = torch.ops.aten
INDICES = torch.tensor([[4, 0, 1], [1, 1, 2]])
CODES = torch.cat([codes(4, 2), torch.zeros(1, 2, dtype=torch.int8)])
ROWS = torch.tensor([0.5, 0.1, 0.25, 0.7, 0.3])


def looked_up(scale: Tensor, axis: int | None, code: Tensor | None = None, *block: int) -> fx.GraphModule:
    g = Written()
    indices = g.input(2, 3, dtype=torch.int64)
    table = g.weight("t", CODES if code is None else code, scale, axis, *block)
    return g.done(g.call(aten.embedding.default, table, indices))


def test_snapshot() -> None:
    gm = looked_up(torch.tensor(0.5), None)
    assert same_numbers(GatherCodes(), gm, INDICES).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
embedding_default_1 = embedding(t__codes, x)
dequantize_affine_default_1 = dequantize(embedding_default_1, t__s, t__z, None)
return [dequantize_affine_default_1]
""",
    )


def test_scales_of_columns_and_of_rows() -> None:
    gm = looked_up(torch.tensor([0.5, 0.3]), 1)
    assert same_numbers(GatherCodes(), gm, INDICES).rewrites == 1
    assert "dequantize(embedding_default_1, t__s, t__z, 2)" in show(gm)
    gm = looked_up(ROWS, 0)
    assert same_numbers(GatherCodes(), gm, INDICES).rewrites == 1
    assert "dequantize" not in show(gm) and "embedding(t__s_column, x)" in show(gm)


def test_what_else_reads_the_table_still_does() -> None:
    g = Written()
    indices = g.input(2, 3, dtype=torch.int64)
    table = g.weight("t", codes(5, 2), torch.tensor(0.5), None)
    gm = g.done(g.call(aten.embedding.default, table, indices), g.call(aten.neg.default, table))
    assert same_numbers(GatherCodes(), gm, INDICES).rewrites == 1
    assert "neg(dequantize_affine_default)" in show(gm)


@pytest.mark.parametrize(
    ("gm", "reason"),
    [
        (looked_up(ROWS, 0, codes(5, 2).clamp(-8, 7)), "its codes fit 4 bits, of which no runtime picks rows"),
        (looked_up(torch.ones(5, 1), 1, codes(5, 2), 2), None),
    ],
    ids=["4 bits", "blocks"],
)
def test_declined(gm: fx.GraphModule, reason: str | None) -> None:
    declines = untouched(GatherCodes(), gm).declines
    assert [each.reason for each in declines] == ([f"the whole table is dequantized: {reason}"] if reason else [])


def test_rows_with_zero_points() -> None:
    gm = looked_up(ROWS, 0)
    gm.t__z = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int8)
    (decline,) = untouched(GatherCodes(), gm).declines
    assert decline.reason == "the whole table is dequantized: each row has a zero point of its own"
