"""Where convolutions of codes lie in memory: as those of floats do, so that backward turns no operand around."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.graph import GraphLowering

import fxquant
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION
from fxquant.passes.joint import use_integer_matmul
from fxquant.support.patches import CHANNELS_LAST

aten = torch.ops.aten


def convolved() -> fx.GraphModule:
    """An activation, a convolution of codes, another activation."""
    graph = fx.Graph()
    code, weight, zero = map(graph.placeholder, ("code", "weight", "zero"))
    before = graph.call_function(aten.relu.default, (code,))
    product = graph.call_function(INTEGER_CONVOLUTION, (before, weight, zero, [1, 1], [0, 0], [1, 1], 1))
    graph.output(graph.call_function(aten.neg.default, (product,)))
    return fx.GraphModule({}, graph)


def preferred(gm: fx.GraphModule) -> set[str]:
    return {node.name for node in GraphLowering.find_nodes_prefer_channels_last(types.SimpleNamespace(module=gm))}


def test_inductor_is_told_of_integer_convolutions_while_it_compiles_ours() -> None:
    gm = convolved()
    before = str(gm.graph)
    with CHANNELS_LAST.acting():
        assert preferred(gm) >= {"relu_default", "integer_convolution_default", "weight"}
        assert str(gm.graph) == before, "the graph is what it was"
    assert preferred(gm) == set()


@pytest.mark.usefixtures("cold", "uncompiled")
def test_codes_are_saved_with_their_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs: layouts are the same where integers would saturate."""
    monkeypatch.setattr(use_integer_matmul, "multiplies_exactly", lambda *_: "")
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 8, 8)
    fxquant.prepare(model, (x,))
    run = torch.compile(model, backend="fxquant", options={"integer_matmul": True})
    strides: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.shape == (2, 8, 6, 6) and t.dtype == torch.uint8:
            strides.append(t.stride())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    assert strides and set(strides) == {(288, 1, 48, 8)}


@pytest.mark.usefixtures("cold")
def test_masks_of_relus_are_saved_with_their_channels_last() -> None:
    """Also of those after the last convolution's inputs: their neighbours in backward's loops lie so."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.norm(self.first(x)) + x)).sum()

    model, x = Residual(), torch.randn(8, 8, 6, 6)
    fxquant.prepare(model, (x,))
    run = torch.compile(model, backend="fxquant")
    strides: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.shape == (1, 8, 6, 6) and t.dtype == torch.uint8:
            strides.append(t.stride()[1:])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    assert len(strides) > 1 and set(strides) == {(1, 48, 8)}
