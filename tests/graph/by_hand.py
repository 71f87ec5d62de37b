"""ATen graphs written node by node, with fake values: for what reads graphs, where Dynamo is not what is tested."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


class ByHand(fx.Graph):
    """A graph whose nodes have the ``val`` that their operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode()

    def input(self, name: str, *shape: int, state: bool = False, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A placeholder; ``state`` for a parameter or buffer."""
        node = self.placeholder(name)
        with self.mode:
            node.meta.update(val=torch.empty(shape, dtype=dtype), state=state)
        return node

    def call(self, op: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        node = self.call_function(op, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*given, **named)
        return node

    def module(self, *results: fx.Node, **attributes: fx.GraphModule) -> fx.GraphModule:
        """The graph with an output, as a module."""
        self.output(results)
        return fx.GraphModule(attributes, self)
