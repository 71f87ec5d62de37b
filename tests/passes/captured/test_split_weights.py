"""Weights that are computed apart from the graph that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxquant.capture.dynamo import capture
from fxquant.graph.bodies import is_checkpoint, nested_graphs
from fxquant.graph.nodes import call_nodes
from fxquant.ops.marks import STAND_IN
from fxquant.passes.base import Pass, PassResult, run_all
from fxquant.passes.captured.constant_weights import is_weight
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.passes.captured.split_weights import Part, Parts, SplitWeights
from fxquant.spec.recipes import INT8
from fxquant.targets.profiles import ONNXRUNTIME
from tests.nets import prepared
from tests.passes.graphs import QUANTIZE

X = torch.tensor([[0.5, -1.0, 2.0], [2.0, 0.25, -0.5]])


def split(
    model: nn.Module, passes: Sequence[Pass] = QUANTIZE
) -> tuple[fx.GraphModule, list[Tensor], list[Tensor], PassResult]:
    """The split graph, its inputs, what it computed before, and the result of the pass."""
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graph = capture(gm, inputs)
        run_all(passes, graph)
        found.append((graph, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(X)
    ((gm, inputs),) = found
    before = list(gm(*inputs))
    return gm, inputs, before, SplitWeights(inputs=tuple(inputs)).run(gm)


def values_of(part: Part, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(part.gm(*(inputs[position] for position in part.positions)))


def assert_same(gm: fx.GraphModule, inputs: list[Tensor], before: list[Tensor], parts: Sequence[Part]) -> None:
    known = [value for part in parts for value in values_of(part, inputs)]
    for old, new in zip(before, gm(*inputs, *known), strict=True):
        assert torch.equal(old, new)


def test_trained_and_other_weights_are_parts_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    gm, inputs, before, result = split(model)
    parts = result.product(Parts).parts
    assert result.modified and result.rewrites == 2 and [part.weights for part in parts] == [1, 1]
    assert [inputs[part.positions[0]].requires_grad for part in parts] == [False, True]
    stands = [node for node in call_nodes(gm.graph) if node.target is STAND_IN]
    assert len(stands) == 2
    added = gm.graph.find_nodes(op="placeholder")[len(inputs) :]
    assert [node.meta["source"] for node in added] == [""] * len(added)
    assert_same(gm, inputs, before, parts)


def test_the_gradient_is_still_the_fake_quants() -> None:
    model = nn.Linear(3, 3)
    gm, inputs, before, result = split(model)
    known = [value for part in result.product(Parts).parts for value in values_of(part, inputs)]
    parameters = [value for value in inputs if value.requires_grad]
    split_grads = torch.autograd.grad(gm(*inputs, *known)[0].square().sum(), parameters)
    for old, new in zip(torch.autograd.grad(before[0].square().sum(), parameters), split_grads, strict=True):
        torch.testing.assert_close(old, new)


def test_weights_of_a_checkpointed_body_are_handed_in() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.fc, x, use_reentrant=False)

    insert = InsertFakeQuantize(recipe=INT8, profile=ONNXRUNTIME)
    gm, inputs, _, result = split(prepared(Checkpointed(), X), (insert,))
    assert result.rewrites == 1
    (outer,) = filter(is_checkpoint, gm.graph.nodes)
    (body,) = nested_graphs(gm, outer)
    assert sum(node.target is STAND_IN for node in call_nodes(body.graph)) == 1
    (part,) = result.product(Parts).parts
    assert part.weights == 1 and values_of(part, inputs)[0].shape == (3, 3)
    assert len(gm.graph.find_nodes(op="placeholder")) == len(inputs) + len(part.fakes)


def test_a_weight_that_the_graph_writes_is_declined() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.add_(1)
            return nn.functional.linear(x, self.weight)

    _, _, _, result = split(Counting())
    (decline,) = result.declines
    assert decline.pass_name == "SplitWeights" and decline.reason
    assert not result.modified and result.product(Parts).parts == ()


def test_a_second_run_finds_nothing() -> None:
    gm, inputs, _, first = split(nn.Linear(3, 3))
    fakes = [fake for part in first.product(Parts).parts for fake in part.fakes]
    again = SplitWeights(inputs=(*inputs, *fakes)).run(gm)
    assert not again.modified and again.product(Parts) == Parts(())
    assert all(user.target is STAND_IN for node in filter(is_weight, gm.graph.nodes) for user in node.users)


def test_a_graph_without_weights() -> None:
    gm, inputs, before, result = split(nn.ReLU())
    assert not result.modified and result.product(Parts).parts == ()
    assert_same(gm, inputs, before, ())
