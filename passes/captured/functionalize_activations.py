"""In-place ops on intermediate values become functional, so that a value has one meaning in the whole graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument_at
from fxquant.graph.bodies import all_graphs
from fxquant.graph.dependence import shares_memory
from fxquant.graph.nodes import call_nodes
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED


@dataclass(frozen=True, kw_only=True)
class FunctionalizeActivations(Pass):
    """``h = add(x, y); relu_(h); f(h)``  →  ``h = add(x, y); r = relu(h); f(r)``.

    Only where the mutated value was made in this graph and no view of it was; mutation of inputs (BatchNorm
    counters, caches) stays.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces each eligible op and later reads of what it mutated."""
        return sum(self._functionalize(module.graph, result) for module in all_graphs(gm))

    def _functionalize(self, graph: fx.Graph, result: PassResult) -> int:
        order = {node: i for i, node in enumerate(graph.nodes)}
        done = 0
        for node in list(call_nodes(graph)):
            functional = _functional_variant(node)
            base = None if functional is None else argument_at(node, 0)
            if functional is None or not isinstance(base, fx.Node) or base.op != "call_function":
                continue
            earlier = [user for user in base.users if order[user] < order[node]]
            if shares_memory(base) or any(shares_memory(user) for user in earlier):
                self.decline(result, node, f"{base.name}, which it changes in place, shares memory with other values")
                continue
            for user in list(base.users):
                if order[user] > order[node]:
                    user.replace_input_with(base, node)
            node.target = functional
            done += 1
        return done


def _functional_variant(node: fx.Node) -> torch._ops.OpOverload | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._schema.name.split("::")[1]
    first = target._schema.arguments[0]
    if target.namespace != "aten" or not name.endswith("_") or first.alias_info is None:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    return overload if isinstance(overload, torch._ops.OpOverload) else None
