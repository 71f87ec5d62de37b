"""Weights that are repeated for each element of the batch."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from fxquant.graph.edit import item
from fxquant.ops.fake_quantize import PER_TENSOR
from fxquant.ops.qparams import SYMMETRIC_QPARAMS
from fxquant.passes.export.quantize_before_repeats import QuantizeBeforeRepeats
from fxquant.plan.plan import Role
from tests.passes.export.test_freeze import quantized_input, site
from tests.passes.export.written import Written, same_numbers
from tests.passes.graphs import show, untouched

aten = torch.ops.aten
WEIGHT = torch.tensor([[1.0, -0.33], [0.12, 0.5], [2.0, 2.0]])


def product(*, role: Role = "weight", of_input: bool = False, repeat: bool = False) -> fx.GraphModule:
    """``matmul(x, FQ(transpose(expand(w, [n, 3, 2])))``, with n of the input."""
    g = Written()
    x = g.input(4, 5, 2)
    w = g.call(aten.mul.Tensor, x, 2.0) if of_input else g.held("w", WEIGHT)
    size = g.graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = 4
    if repeat:
        moved = g.call(aten.repeat.default, w, [size, 1, 1])
    else:
        moved = g.call(aten.expand.default, w, [size, 5, 2] if of_input else [size, 3, 2])
    moved = g.call(aten.transpose.int, moved, -1, -2)
    both = g.call(SYMMETRIC_QPARAMS, g.call(aten.detach.default, moved), None, 127)
    grid = item(g.graph, both, 0), item(g.graph, both, 1)
    quantized = site(g.call(PER_TENSOR, moved, *grid, -127, 127, rounding="divide"), "q.rhs", role)
    return g.done(g.call(aten.matmul.default, x, quantized), moved)


X = torch.randn(4, 5, 2)


def test_snapshot() -> None:
    gm = product()
    assert same_numbers(QuantizeBeforeRepeats(), gm, X).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
sym_size_int = sym_size(x, 0)
expand_default = expand(w, [sym_size_int, 3, 2])
transpose_int = transpose(expand_default, -1, -2)
symmetric_qparams_default_1 = symmetric_qparams(w, None, 127)
getitem_2 = getitem(symmetric_qparams_default_1, 0)
getitem_3 = getitem(symmetric_qparams_default_1, 1)
fake_quantize_per_tensor_affine_tensor_qparams_1 = fake_quantize_per_tensor(w, getitem_2, getitem_3, -127, 127)
expand_default_1 = expand(fake_quantize_per_tensor_affine_tensor_qparams_1, [sym_size_int, 3, 2])
transpose_int_1 = transpose(expand_default_1, -1, -2)
matmul_default = matmul(x, transpose_int_1)
return [matmul_default, transpose_int]
""",
    )


def test_repeats() -> None:
    assert same_numbers(QuantizeBeforeRepeats(), product(repeat=True), X).rewrites == 1


@pytest.mark.parametrize("options", [{"role": "activation"}, {"of_input": True}], ids=str)
def test_untouched(options: dict[str, object]) -> None:
    untouched(QuantizeBeforeRepeats(), product(**options))


def test_a_range_that_is_kept_needs_no_move() -> None:
    g = Written()
    expanded = g.call(aten.expand.default, g.held("w", WEIGHT), [4, 3, 2]) if g.input(4, 2) else None
    assert expanded is not None
    untouched(QuantizeBeforeRepeats(), g.done(quantized_input(g, expanded)))
