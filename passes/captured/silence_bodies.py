"""Marks of owners leave the bodies whose ranges no graph could update."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxquant.graph.bodies import is_checkpoint, nested_graphs
from fxquant.graph.nodes import is_bind


def silence(gm: fx.GraphModule, *, reached: bool = True) -> None:
    """Takes the marks of owners out of the bodies of transforms, branches and loops, and the state that they brought.

    A range that such a body updated would be lost with it; checkpointed bodies are traced into the step.
    """
    for node in list(gm.graph.nodes):
        if not reached and is_bind(node):
            gm.graph.erase_node(node)
        elif node.op == "call_function" and (bodies := nested_graphs(gm, node)):
            inside = reached and is_checkpoint(node)
            if not inside and any(is_bind(n) for body in bodies for n in body.graph.nodes):
                _drop_state(node, bodies)
            for body in bodies:
                silence(body, reached=inside)
    if not reached:
        gm.recompile()


def _drop_state(node: fx.Node, bodies: Sequence[fx.GraphModule]) -> None:
    """Operands of control flow that only marks read: kept for backward, they may not be updated meanwhile.

    They stand in the last argument, and so behind the other placeholders of every body.
    """
    operands = node.args[-1]
    if not isinstance(operands, (tuple, list)):
        return
    inputs = [[n for n in body.graph.nodes if n.op == "placeholder"][-len(operands) :] for body in bodies]
    users = [[user for listed in inputs for user in listed[index].users] for index in range(len(operands))]
    dropped = [bool(found) and all(map(is_bind, found)) for found in users]
    for bind in dict.fromkeys(user for found, drop in zip(users, dropped, strict=True) if drop for user in found):
        bind.graph.erase_node(bind)
    for listed in inputs:
        for value, drop in zip(listed, dropped, strict=True):
            if drop:
                value.graph.erase_node(value)
    kept = [operand for operand, drop in zip(operands, dropped, strict=True) if not drop]
    node.update_arg(len(node.args) - 1, type(operands)(kept))
