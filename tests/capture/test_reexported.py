"""A graph that was edited is the program that torch.export would make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from fxquant.capture.exported import exported_graph
from fxquant.capture.open_sizes import OpenSizes, by_parameter, open_batch
from fxquant.capture.reexported import program_of


class Named(nn.Module):
    """Keywords, a number among the inputs, a dictionary of results, some no tensors, a weight of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor, factor: int, *, mask: Tensor) -> dict[str, Any]:
        y = self.second(torch.relu(self.first(x))) * factor
        return {"y": (y + self.table) * mask, "parts": [y, x], "nothing": None, "size": x.shape[0]}


class Counting(nn.Module):
    """A forward that writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(input) * self.calls


class Branching(nn.Module):
    """Bodies that read a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        def yes(value: Tensor) -> Tensor:
            return value @ self.weight

        def no(value: Tensor) -> Tensor:
            return value - 1

        return torch.cond(x.sum() > 0, yes, no, (x,))


class Sizes(nn.Module):
    """An input with the name that a lifted tensor could have; a size, a truth and a quotient of it as results."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, constant_0: Tensor) -> tuple[Any, ...]:
        return self.layer(x) + constant_0, x.shape[0], x.shape[0] > 2, x.shape[0] / 2


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_open: bool = True


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CASES = [
    Case("sequential", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (X,), {}),
    Case("named", Named, (X, 3), {"mask": torch.ones(6, 1)}),
    Case("fixed", Named, (X, 3), {"mask": torch.ones(6, 1)}, False),
    Case("counting", Counting, (X,), {}),
    Case("sizes", Sizes, (X, X), {}),
    Case("branching", Branching, (X,), {}, False),
]


def graph_of(case: Case) -> tuple[fx.GraphModule, OpenSizes | None]:
    torch.manual_seed(1)
    sizes = open_batch(case.args, case.kwargs) if case.is_open else None
    with torch.no_grad():
        return exported_graph(case.model().eval(), case.args, case.kwargs, sizes), sizes


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.run_decompositions().graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_program_that_a_trace_gives(case: Case) -> None:
    gm, sizes = graph_of(case)
    found = program_of(gm, case.args, case.kwargs, sizes)
    shapes = None if sizes is None else by_parameter(gm.forward, sizes)
    with torch.no_grad():
        traced = torch.export.export(gm, case.args, case.kwargs, dynamic_shapes=shapes, strict=False)
    assert found.graph_signature.user_inputs == traced.graph_signature.user_inputs
    assert found.call_spec == traced.call_spec
    assert {*found.state_dict} <= {*traced.state_dict} and len(found.range_constraints) == len(traced.range_constraints)
    assert operators(found) == operators(traced)
    modules = [copy.deepcopy(each.module()) for each in (found, traced)]  # one may write what both read
    results = [_pytree.tree_leaves(module(*case.args, **case.kwargs)) for module in modules]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_nodes_that_read_one_tensor_are_one_input() -> None:
    """As passes leave them, and a node that a pass has made is in the program."""
    gm, _ = graph_of(CASES[0])
    weight = next(node for node in gm.graph.nodes if node.op == "get_attr")
    with gm.graph.inserting_after(weight):
        again = gm.graph.get_attr(weight.target)
    again.meta = dict(weight.meta)
    (first, _) = (node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    first.replace_input_with(weight, again)
    with gm.graph.inserting_after(weight):
        gm.graph.call_function(torch.ops.aten.neg.default, (weight,)).meta = dict(weight.meta)
    program = program_of(gm, (X,), {}, None)
    assert len(program.graph_signature.buffers) == len({*program.graph_signature.buffers}) == 4
    assert "aten.neg.default" in [str(node.target) for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(X), gm(X), rtol=0, atol=0)
