"""Graphs of the export stage, written by hand: inputs, pairs, integer weights, calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.graph.edit import call
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant
from fxquant.passes.stages import EXPORT, enter
from tests.passes.graphs import apply


class Written:
    """A graph in the making; `done` gives it away. Nodes are named by their operators."""

    def __init__(self) -> None:
        self.gm = fx.GraphModule({}, fx.Graph())
        self.graph = self.gm.graph
        self.mode = FakeTensorMode()
        self.first: fx.Node | None = None

    def input(self, *sizes: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A placeholder."""
        node = self.graph.placeholder("x" if self.first is None else f"x{len(self.graph.nodes)}")
        with self.mode:
            node.meta["val"] = torch.empty(sizes, dtype=dtype)
        self.first = self.first or node
        return node

    def held(self, name: str, value: Tensor) -> fx.Node:
        """A constant."""
        assert self.first is not None
        return constant(self.gm, name, value, self.first)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        assert self.first is not None
        return call(self.graph, op, *args, like=self.first, **kwargs)

    def pair(self, value: fx.Node, scale: float = 0.1, label: str = "in") -> fx.Node:
        """A Q/DQ pair."""
        return self.call(QUANTIZE_DEQUANTIZE, value, scale, 3, -128, 127, label)

    def weight(self, name: str, code: Tensor, scale: Tensor, axis: int | None, *block: int) -> fx.Node:
        """Integers and the call that makes floats of them."""
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
        held = [
            self.held(f"{name}.{part}", v)
            for part, v in zip(("codes", "s", "z"), (code, scale, zero_point), strict=True)
        ]
        return self.call(DEQUANTIZE, *held, axis, *block)

    def done(self, *results: fx.Node) -> fx.GraphModule:
        """The graph as a module."""
        self.graph.output(results)
        self.gm.recompile()
        return enter(self.gm, EXPORT)


def same_numbers(each: Pass, gm: fx.GraphModule, *inputs: Tensor) -> PassResult:
    """Runs a pass twice, as `apply` does; what the graph computes stays what it was, to the bit."""
    before = gm(*inputs)
    result = apply(each, gm)
    for old, new in zip(before, gm(*inputs), strict=True):
        assert torch.equal(old, new)
    return result


def codes(*sizes: int) -> Tensor:
    """Different int8 codes."""
    return (torch.arange(torch.Size(sizes).numel()) * 7 % 255 - 127).to(torch.int8).reshape(sizes)
