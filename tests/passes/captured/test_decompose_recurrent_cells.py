"""DecomposeRecurrentCells: the values of torch's cells, forward and backward, and products that get quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fxquant
from fxquant.passes.captured.decompose_recurrent_cells import DecomposeRecurrentCells
from fxquant.prepared.root import plan_of
from tests.onnx.agreement import assert_codes_agree
from tests.passes.graphs import apply, captured, show, untouched

PASS = DecomposeRecurrentCells()
X = torch.randn(5, 3)
CELLS: dict[str, Any] = {
    "lstm": lambda bias: nn.LSTMCell(3, 4, bias=bias),
    "gru": lambda bias: nn.GRUCell(3, 4, bias=bias),
    "tanh": lambda bias: nn.RNNCell(3, 4, bias=bias),
    "relu": lambda bias: nn.RNNCell(3, 4, bias=bias, nonlinearity="relu"),
}


class Steps(nn.Module):
    """Two steps of a cell from a given state; the second state reaches the result whole."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if isinstance(self.cell, nn.LSTMCell):
            state = (h, h.tanh())
            for _ in range(2):
                state = self.cell(x, state)
            return torch.cat(state, 1)
        for _ in range(2):
            h = self.cell(x, h)
        return h


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients_are_torch_s(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    model, h = Steps(CELLS[name](bias)), torch.randn(5, 4)
    gm = captured(model, X, h)
    assert apply(PASS, gm).rewrites == 2 and "_cell" not in gm.code
    inputs = {"L['x']": X, "L['h']": h}
    parameters = {f"L['self']._modules['cell']._parameters['{n}']": p for n, p in model.cell.named_parameters()}
    inputs |= parameters
    sources = [node.meta["source"] for node in gm.graph.nodes if node.op == "placeholder"]
    (found,) = gm(*(inputs[source] for source in sources))
    expected = model(X, h)
    # A sigmoid of a vector and one of its last few elements may differ in the last bit, and what is which by layout.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # sums of the steps in another order


def test_a_gru_cell_becomes_two_products_and_gates() -> None:
    shapes = (5, 3), (5, 2), (6, 3), (6, 2)
    gm = captured(lambda x, h, w, u: torch.gru_cell(x, h, w, u), *(torch.randn(shape) for shape in shapes))
    apply(PASS, gm)
    assert_expected_inline(
        show(gm),
        """\
linear_default = linear(arg0_1, arg2_1, None)
linear_default_1 = linear(arg1_1, arg3_1, None)
chunk_default = chunk(linear_default, 3, 1)
getitem = getitem(chunk_default, 0)
getitem_1 = getitem(chunk_default, 1)
getitem_2 = getitem(chunk_default, 2)
chunk_default_1 = chunk(linear_default_1, 3, 1)
getitem_3 = getitem(chunk_default_1, 0)
getitem_4 = getitem(chunk_default_1, 1)
getitem_5 = getitem(chunk_default_1, 2)
add_tensor = add(getitem_3, getitem)
sigmoid_default = sigmoid(add_tensor)
add_tensor_1 = add(getitem_4, getitem_1)
sigmoid_default_1 = sigmoid(add_tensor_1)
mul_tensor = mul(getitem_5, sigmoid_default)
add_tensor_2 = add(getitem_2, mul_tensor)
tanh_default = tanh(add_tensor_2)
sub_tensor = sub(arg1_1, tanh_default)
mul_tensor_1 = mul(sub_tensor, sigmoid_default_1)
add_tensor_3 = add(mul_tensor_1, tanh_default)
return [add_tensor_3]
""",
    )


def test_other_graphs_are_left_alone() -> None:
    assert untouched(PASS, captured(nn.Linear(3, 3), X)).declines == []


@pytest.mark.parametrize("name", CELLS)
def test_cells_train_quantized_and_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, h = Steps(CELLS[name](True)), torch.randn(5, 4)
    fxquant.prepare(model, (X, h))
    sites = plan_of(model).sites
    assert [site.local.role for site in sites].count("weight") == 2  # one each, whatever the number of steps
    step = torch.compile(model, backend="fxquant_eager", fullgraph=True)
    for _ in range(2):
        step(X, h).square().mean().backward()
    model.eval()
    fxquant.export_onnx(model, (X, h), tmp_path / "m.onnx")
    report = fxquant.verify_onnx(model, (X, h), tmp_path / "m.onnx", rounds=0)
    assert_codes_agree(report)
    assert report.integer_share == 1.0
    assert len(report.rows) == 3  # x's product is the same in both steps
