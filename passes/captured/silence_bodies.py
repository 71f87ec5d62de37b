"""Marks of owners leave the bodies whose ranges no graph could update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.bodies import is_checkpoint, nested_graphs
from fxquant.graph.nodes import is_bind
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED


@dataclass(frozen=True, kw_only=True)
class SilenceBodies(Pass):
    """``cond(p, {bind(…, s); f(x)}, {g(x)}, (x, s))``  →  ``cond(p, {f(x)}, {g(x)}, (x,))``, and so for every body.

    Bodies of transforms, branches and loops: a range that such a body updated would be lost with it. Operands that only
    marks read leave with them. Checkpointed bodies are traced into the step, and keep theirs.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """How many marks it took out."""
        return _silence(gm, reached=True)


def _silence(gm: fx.GraphModule, *, reached: bool) -> int:
    done = 0
    for node in list(gm.graph.nodes):
        if not reached and is_bind(node):
            gm.graph.erase_node(node)
            done += 1
        elif node.op == "call_function" and (bodies := nested_graphs(gm, node)):
            inside = reached and is_checkpoint(node)
            if not inside and any(is_bind(n) for body in bodies for n in body.graph.nodes):
                done += _drop_state(node, bodies)
            done += sum(_silence(body, reached=inside) for body in bodies)
    return done


def _drop_state(node: fx.Node, bodies: Sequence[fx.GraphModule]) -> int:
    """Operands of control flow that only marks read: kept for backward, they may not be updated meanwhile.

    They stand in the last argument, and so after the other placeholders of every body. Returns how many marks went too.
    """
    operands = node.args[-1]
    if not isinstance(operands, (tuple, list)):
        return 0
    inputs = [[n for n in body.graph.nodes if n.op == "placeholder"][-len(operands) :] for body in bodies]
    users = [[user for listed in inputs for user in listed[index].users] for index in range(len(operands))]
    dropped = [bool(found) and all(map(is_bind, found)) for found in users]
    binds = dict.fromkeys(user for found, drop in zip(users, dropped, strict=True) if drop for user in found)
    for bind in binds:
        bind.graph.erase_node(bind)
    for listed in inputs:
        for value, drop in zip(listed, dropped, strict=True):
            if drop:
                value.graph.erase_node(value)
    kept = [operand for operand, drop in zip(operands, dropped, strict=True) if not drop]
    node.update_arg(len(node.args) - 1, type(operands)(kept))
    return len(binds)
