"""From a graph to the list of its operators that people look at."""

from __future__ import annotations

import re

import torch
from torch import fx

from fxquant.graph.frames import user_line
from fxquant.graph.kinds import operands
from fxquant.graph.meta import source_of
from fxquant.graph.moves import PARTING, passes_values
from fxquant.graph.nodes import is_bind, is_state, packet
from fxquant.graph.views import Item
from fxquant.report.operators import Operator, Wire, declines_of, label_of
from fxquant.report.sited_graph import SitedGraph


def graph_operators(sited: SitedGraph, arguments: tuple[str, ...]) -> tuple[Operator, ...]:
    """The graph's operators in execution order; what is computed from parameters alone is left out.

    ``arguments`` names those of the model's forward, where the graph begins there.
    """
    index: dict[fx.Node, int] = {}
    listed: list[Operator] = []
    declined = declines_of(sited.plan.declined)
    for node in sited.graph.nodes:
        item = Item.of(node)
        if item is not None and item.source in index and _is_shown(sited, node):
            index[node] = index[item.source]
            continue
        operator = _operator(sited, node, index, arguments, declined)
        if operator is not None:
            index[node] = len(listed)
            listed.append(operator)
    return tuple(listed)


def _operator(
    sited: SitedGraph,
    node: fx.Node,
    index: dict[fx.Node, int],
    arguments: tuple[str, ...],
    declined: dict[tuple[str, str], tuple[str, ...]],
) -> Operator | None:
    """The node as people see it; None for one that is not shown."""
    if node.op == "placeholder" and not is_state(node) and node.users:
        return Operator(role="input", label=_input_name(node, arguments), name=node.name)
    if node.op == "output":
        return Operator(role="output", label="output", name=node.name, wires=_wires(sited, node, index))
    if not _is_shown(sited, node):
        return None
    return Operator(
        # What takes tensors apart is, like what moves values, no work worth a large box.
        role="mover" if passes_values(node) or packet(node) in PARTING else "operator",
        label=label_of(node),
        name=node.name,
        module=sited.path(node),
        source=user_line(node),
        place=sited.place(node),
        head=sited.heads.get(node),
        declined=declined.get((node.name, user_line(node)), ()),
        wires=_wires(sited, node, index),
    )


def _is_shown(sited: SitedGraph, node: fx.Node) -> bool:
    if node.op != "call_function" or is_bind(node) or node in sited.constants:
        return False
    value = node.meta.get("val")
    return any(isinstance(part, torch.Tensor) for part in torch.utils._pytree.tree_leaves(value))


def _wires(sited: SitedGraph, node: fx.Node, index: dict[fx.Node, int]) -> tuple[Wire, ...]:
    read = operands(node)
    wires = [
        Wire(operand=name, source=index.get(value), site=sited.site(node, name, value), serves=sited.edge(node, name))
        for name, value in read.items()
        if value in index or value in sited.constants
    ]
    others = [value for value in node.all_input_nodes if value not in read.values() and value in index]
    return (*wires, *(Wire(operand="", source=index[v], site=sited.site(node, "", v)) for v in others))


def _input_name(node: fx.Node, arguments: tuple[str, ...]) -> str:
    """As the user's forward calls it, where Dynamo says so."""
    named = re.fullmatch(r"L\['(.+?)'\](.*)", source_of(node))
    if named is None:
        return node.name
    name, rest = named.groups()
    number = re.fullmatch(r"\[(\d+)\](.*)", rest) if name == "args" else None
    if number is not None and int(number[1]) < len(arguments):
        return arguments[int(number[1])] + number[2]
    keyword = re.fullmatch(r"\['(.+?)'\](.*)", rest) if name == "kwargs" else None
    return "".join(keyword.groups() if keyword else (name, rest))
