"""Inputs of a graph that is made by hand, for tensors that are at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx


def fake_inputs(graph: fx.Graph, tensors: Sequence[Tensor]) -> list[fx.Node]:
    """A placeholder for each tensor, with a fake value of its form."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # private; tried on 2.13

    mode, nodes = FakeTensorMode(), []
    for number, tensor in enumerate(tensors):
        node = graph.placeholder(f"input{number}")
        node.meta["val"] = mode.from_tensor(tensor)
        nodes.append(node)
    return nodes
