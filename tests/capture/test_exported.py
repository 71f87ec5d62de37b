"""A module under torch.export as the ATen graph that passes see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture.exported import exported_graph
from fxquant.graph.nodes import call_nodes
from fxquant.passes.stages import CAPTURED, stage_of

X = torch.tensor([[0.5, -1.0, 2.0], [2.0, 0.25, -0.5]])


class Net(nn.Module):
    """Inputs in place and by keyword, a mapping as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = self.fc(x) * scale
        y.exp()
        return {"out": y + self.shift, "both": [y, x]}


def test_the_calling_convention_is_the_models() -> None:
    model = Net().eval()
    scale = torch.tensor([2.0])
    gm = exported_graph(model, (X,), {"scale": scale}, None)
    assert stage_of(gm) is CAPTURED
    got, wanted = gm(X, scale=scale), model(X, scale=scale)
    assert got.keys() == wanted.keys()
    torch.testing.assert_close(got, wanted)


def test_state_is_read_in_front_by_its_path() -> None:
    gm = exported_graph(Net().eval(), (X,), {"scale": torch.tensor([2.0])}, None)
    kinds = [node.op for node in gm.graph.nodes]
    held = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    assert sorted(held) == ["fc.bias", "fc.weight", "shift"]
    assert kinds[: len(held)] == ["get_attr"] * len(held)
    names = [str(node.target) for node in call_nodes(gm.graph)]
    assert "aten.exp.default" not in names, "nothing reads it"
    assert all("val" in node.meta for node in call_nodes(gm.graph))


def test_open_sizes() -> None:
    gm = exported_graph(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (X,), {}, (({0: torch.export.Dim.AUTO},), {}))
    relu = list(call_nodes(gm.graph))[-1]
    assert isinstance(relu.meta["val"].shape[0], torch.SymInt)
    assert gm(torch.ones(5, 3)).shape == (5, 3)


class Shared(nn.Module):
    """One layer by two paths, and a call through the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_a_module_with_two_paths_has_the_first() -> None:
    gm = exported_graph(Shared().eval(), (X,), {}, None)
    (linear,) = (node for node in call_nodes(gm.graph) if "linear" in node.name)
    assert [path for path, _ in linear.meta["nn_module_stack"].values()] == ["", "first"]


class Blocks(nn.Module):
    """Autocast with a block without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        with torch.no_grad():
            return y + self.fc(y)


def test_the_graph_computes_in_the_precision_of_the_parameters() -> None:
    model = Blocks().eval()
    gm = exported_graph(model, (X,), {}, None)
    names = [str(node.target) for node in call_nodes(gm.graph)]
    assert names.count("aten.linear.default") == 2 and not any("wrap_with" in name for name in names)
    with torch.no_grad():
        y = model.fc(X)
        torch.testing.assert_close(gm(X), y + model.fc(y))
    assert {node.meta["val"].dtype for node in call_nodes(gm.graph) if "linear" in node.name} == {torch.float32}


def test_autocast_is_what_it_was_afterwards() -> None:
    exported_graph(Blocks().eval(), (X,), {}, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(X, X.t()).dtype == torch.bfloat16


def test_errors_come_through_and_leave_autocast_as_it_was() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        exported_graph(Failing(), (X,), {}, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(X, X.t()).dtype == torch.bfloat16
