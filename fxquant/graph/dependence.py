"""What a value depends on, shares memory with, and when it is changed in place."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxquant.graph.arguments import named_arguments
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.moves import AGNOSTIC, DROPOUT
from fxquant.graph.nodes import is_bind, is_state, packet

aten = torch.ops.aten


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters, buffers and constants only: what weights may be.

    A buffer that the graph writes something else into, as a cache of keys and values, is none of them.
    """
    written: set[fx.Node] = set()
    changes = [node for node in graph.nodes if written_operands(node)]
    memory = _memory(graph) if changes else {}
    while True:
        found = _constants(graph, written)
        fed = [node for node in changes if not found.issuperset(node.all_input_nodes)]
        more = {memory[operand] for node in fed for operand in written_operands(node)} - written
        if not more:
            return found
        written |= more


def _constants(graph: fx.Graph, written: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr" or (node.op == "placeholder" and is_state(node)):
            found.add(node)
            continue
        inputs = node.all_input_nodes if node.op == "call_function" and not is_bind(node) else []
        if found.issuperset(inputs) and (inputs or packet(node) is aten.full):
            found.add(node)
    return found


def written_attributes(graph: fx.Graph) -> list[str]:
    """The tensors of a graph's module that its operators write into, by name."""
    changes = [operand for node in graph.nodes for operand in written_operands(node)]
    memory = _memory(graph) if changes else {}
    return list(dict.fromkeys(str(memory[each].target) for each in changes if memory[each].op == "get_attr"))


def _memory(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Node → the node that made the memory which its value may be a view of."""
    memory: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        memory[node] = memory[inputs[0]] if shares_memory(node) and inputs else node
    return memory


def weight_computations(graph: fx.Graph, constants: set[fx.Node]) -> set[fx.Node]:
    """The constants that nothing but weights, and buffers, are computed from: what parametrizations run.

    A deployed model holds their results; a product among them is none of its products.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in constants and all(user in found or _reads_as_weight(user, node) for user in node.users):
            found.add(node)
    return found


def _reads_as_weight(user: fx.Node, value: fx.Node) -> bool:
    kind = kind_of(user)
    reading = [name for name, operand in operands(user).items() if operand is value]
    return kind is not None and len(reading) == 1 and kind.is_weight(reading[0])


def same_views(graph: fx.Graph, constants: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Constant → the first node that holds the same view of the same tensor: ``w.t()`` written twice is one."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in constants:
            if packet(node) not in AGNOSTIC or len(node.all_input_nodes) != 1:
                first[node] = node
                continue
            (source,) = node.all_input_nodes
            how = sorted((name, repr(value)) for name, value in named_arguments(node).items() if value is not source)
            first[node] = seen.setdefault((node.target, first[source], *how), node)
    return first


def shares_memory(node: fx.Node) -> bool:
    """Whether the node's value may be a view of its first operand (or that operand itself)."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # an item of several results, or a nested graph
    return packet(node) in DROPOUT or any(r.alias_info is not None for r in node.target._schema.returns)


def changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that are read again after they, or a view of them, were changed in place."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    memory = _memory(graph)
    changes: dict[fx.Node, list[int]] = {}
    for node in graph.nodes:
        for changed in written_operands(node):
            changes.setdefault(memory[changed], []).append(order[node])
    found = set()
    for node in graph.nodes:
        after = next((i for i in changes.get(memory[node], ()) if i > order[node]), None)
        if after is not None and any(order[user] > after for user in node.users):
            found.add(node)
    return found


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator's schema says it writes into, those in lists too."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = named_arguments(node)
    written = [given.get(each.name) for each in schema.arguments if each.is_write]
    return [value for value in tree_leaves(written) if isinstance(value, fx.Node)]
