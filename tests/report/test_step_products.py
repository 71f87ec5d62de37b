"""The products of a step: integer or float, forward and backward, with their shares of the work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.passes.joint import use_integer_backward, use_integer_matmul
from fxquant.report.cost import Cost


@pytest.fixture(scope="module")
def integers() -> Cost:
    """Two linear layers of 16 → 32 → 8 on 24 rows, whose input has no gradient."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (use_integer_matmul, use_integer_backward):
            patch.setattr(module, "multiplies_exactly", lambda *_: "")  # nothing is computed
        torch._dynamo.reset()
        model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(24, 16)
        fxquant.prepare(model, (x,))
        return fxquant.cost(model, (x,), options={"integer_matmul": True, "integer_backward": True})


def test_each_product_is_counted_once_in_its_half(integers: Cost) -> None:
    """24·16·32 and 24·32·8 forward; the gradients of two weights and of the hidden layer backward, the last float."""
    first, second = 24 * 16 * 32, 24 * 32 * 8
    found = [(one.half, one.integer, one.work) for one in integers.products]
    assert found[:2] == [("forward", True, first), ("forward", True, second)]
    assert sorted(found[2:]) == sorted(
        [("backward", False, second), ("backward", False, second), ("backward", True, first)]
    )
    assert sum(one.share for one in integers.products) == pytest.approx(1)
    assert integers.products[0].share == pytest.approx(first / (2 * first + 3 * second))


def test_the_report_shows_them(integers: Cost) -> None:
    text = str(integers)
    assert "products" in text and "aten._int_mm" in text and "24x16 · 16x32" in text
    assert integers.to_dict()["products"][0]["shapes"] == [[24, 16], [16, 32]]


def test_kept_weights_are_refused(integers: Cost) -> None:
    model = fxquant.prepare(nn.Linear(4, 4), (torch.randn(2, 4),))
    wanted = r"options\['reuse_weights'\] must be left out where a step's cost is counted: got True\."
    with pytest.raises(InvalidArgument, match=wanted):
        fxquant.cost(model, (torch.randn(2, 4),), options={"reuse_weights": True})
