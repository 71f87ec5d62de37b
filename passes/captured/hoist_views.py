"""What is viewed in another shape after its fake-quant is viewed so before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument_at, set_argument
from fxquant.graph.bodies import all_graphs
from fxquant.graph.dependence import changed_in_place
from fxquant.graph.edit import arguments_with, call
from fxquant.graph.nodes import call_nodes, only_user
from fxquant.graph.views import FakeQuant
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten

# To the operator that does the same to values of any strides: those before a fake-quant may be other than after.
_VIEWS = {
    aten.permute.default: aten.permute.default,
    aten.transpose.int: aten.transpose.int,
    aten.t.default: aten.t.default,
    aten.unsqueeze.default: aten.unsqueeze.default,
    aten.squeeze.dim: aten.squeeze.dim,
    aten.reshape.default: aten.reshape.default,
    aten.view.default: aten.reshape.default,
    aten.flatten.using_ints: aten.flatten.using_ints,
    aten.unflatten.int: aten.unflatten.int,
}


@dataclass(frozen=True, kw_only=True)
class HoistViews(Pass):
    """``view(FQ(x, s, z))``  →  ``FQ(view(x), s, z)``, where nothing else reads the fake-quantized tensor.

    Exact, as one scale serves the whole tensor. A matrix product takes memory, not expressions: Inductor stores the
    quantized tensor in its own shape, and where attention's heads are side by side in memory but not in the shape, it
    copies it once more for the product, in forward and for the weight's gradient: 2 % of the bytes that a
    transformer's step moves. The view of what attention wrote is free.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Hoists in ``gm`` and its nested bodies."""
        return sum(_hoist(module.graph) for module in all_graphs(gm))


def _hoist(graph: fx.Graph) -> int:
    changed = changed_in_place(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    done = 0
    for node in list(call_nodes(graph)):
        site = FakeQuant.of(node)
        if site is not None and site.axis is None and node not in changed:
            while _hoist_one(graph, site, order):
                done += 1
    return done


def _hoist_one(graph: fx.Graph, site: FakeQuant, order: dict[fx.Node, int]) -> bool:
    node = site.node
    user = only_user(node)
    if user is None or user.target not in _VIEWS or argument_at(user, 0) is not node:
        return False
    if any(order[source] > order[node] for source in user.all_input_nodes):
        return False  # a size that is computed only later
    with graph.inserting_before(node):
        args, kwargs = arguments_with(user, node, site.input)
        view = call(graph, _VIEWS[user.target], *args, like=user, **kwargs)
    set_argument(node, "input", view)
    node.meta["val"] = user.meta["val"]
    user.replace_all_uses_with(node)
    graph.erase_node(user)
    return True
