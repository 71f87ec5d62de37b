"""What `torch.func` transforms becomes one call; what torch.export wraps becomes its nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad, vmap

from fxquant.graph.bodies import all_graphs, is_transform
from fxquant.graph.edit import copied
from fxquant.graph.nodes import call_nodes
from fxquant.passes.dynamo.dissolve_exported import DissolveExported
from fxquant.passes.dynamo.outline_transforms import OutlineTransforms, Whole, has_transforms
from fxquant.passes.stages import DYNAMO, enter
from tests.passes.graphs import apply, untouched

X = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


def dynamo(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """What Dynamo writes."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append(copied(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*args)
    (gm,) = found
    return gm


def test_a_transform_and_what_is_around_it() -> None:
    gm = dynamo(lambda x: vmap(lambda row: row * row.sum())(x + 1).relu(), X)
    assert has_transforms(gm)
    (expected,) = gm(X)
    assert apply(OutlineTransforms(), enter(gm, DYNAMO)).rewrites == 1
    assert not has_transforms(gm)
    names = [getattr(node.target, "__name__", node.target) for node in gm.graph.nodes if "call" in node.op]
    assert names[-3:] == ["wrap", "getitem", "relu"] and "add" in names
    (called,) = filter(is_transform, gm.graph.nodes)
    body = gm.get_submodule(str(called.args[0].target))
    assert isinstance(body, Whole) and isinstance(called.args[1], fx.Node)
    assert list(all_graphs(gm)) == [gm], "no pass sees what is wrapped"
    assert torch.equal(gm(X)[0], expected)


def test_transforms_inside_transforms_are_one_call() -> None:
    gm = dynamo(lambda x: vmap(grad(lambda row: (row**3).sum()))(x), X)
    (expected,) = gm(X)
    assert apply(OutlineTransforms(), gm).rewrites == 1
    torch.testing.assert_close(gm(X)[0], expected)
    torch.testing.assert_close(expected, 3 * X**2)


def test_without_transforms() -> None:
    gm = dynamo(lambda x: x.sin(), X)
    assert not has_transforms(gm)
    untouched(OutlineTransforms(), gm)
    untouched(DissolveExported(), gm)


class Blocks(torch.nn.Module):
    """Autocast, and a block without gradients inside it, around a parameter and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
            with torch.no_grad():
                z = self.fc(x) * torch.tensor([2.0, 3.0])
        return y + z


def test_blocks_become_their_nodes() -> None:
    module = Blocks().eval()
    program = torch.export.export(module, (X,), strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    wrapped = [node for node in call_nodes(gm.graph) if "wrap_with" in str(node.target)]
    assert wrapped
    result = apply(DissolveExported(), enter(gm, DYNAMO))
    assert result.rewrites == len(wrapped)
    names = {str(node.target) for node in call_nodes(gm.graph)}
    assert not any("wrap_with" in name for name in names) and "aten.linear.default" in names
    assert list(all_graphs(gm)) == [gm]
    assert all("val" in node.meta for node in call_nodes(gm.graph))
    with torch.no_grad():
        torch.testing.assert_close(gm(X), module.fc(X) + module.fc(X) * torch.tensor([2.0, 3.0]))
