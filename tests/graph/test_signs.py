"""What is known of the signs of a result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.graph.signs import is_even, is_positive
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from tests.passes.graphs import captured

X = torch.randn(2, 4, 8)
LAYER, NORM = nn.Linear(8, 8), nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("function", "positive", "even"),
    [
        (F.relu, True, False),
        (F.relu6, True, False),
        (lambda x: x.clamp_min(0), True, False),
        (torch.sigmoid, True, False),
        (lambda x: x.softmax(-1), True, False),
        (F.gelu, False, False),
        (F.silu, False, False),
        (lambda x: x + 1, False, False),
        (NORM, False, True),
        (lambda x: F.rms_norm(x, (8,)), False, True),
        (LAYER, False, True),
        (lambda x: x @ x.mT, False, True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False, True),
        (lambda x: F.dropout(NORM(x)), False, True),
        (lambda x: F.dropout(F.gelu(x)), False, False),
    ],
)
def test_signs_of_a_result(function: Callable[[Tensor], Tensor], positive: bool, even: bool) -> None:
    gm = captured(function, X, passes=(FunctionalizeActivations(),))
    (result,) = gm.graph.output_node().all_input_nodes
    assert (is_positive(result), is_even(result)) == (positive, even)


def test_inputs_may_be_anything() -> None:
    gm = captured(lambda x: x.neg(), X)
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert not is_positive(x) and not is_even(x)
