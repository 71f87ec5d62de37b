"""The graphs inside a graph: bodies of higher-order operators, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap  # private; tried on 2.13 and 2.15


def nested_graphs(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graph modules that a node's arguments name: bodies of higher-order operators."""
    named = [a for a in node.all_input_nodes if a.op == "get_attr"]
    modules = [gm.get_submodule(str(a.target)) for a in named if isinstance(_attribute(gm, a), fx.GraphModule)]
    return [module for module in modules if isinstance(module, fx.GraphModule)]


def _attribute(gm: fx.GraphModule, node: fx.Node) -> object:
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def execution_order(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """All call nodes, those of nested bodies where they run."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            yield node
            for body in nested_graphs(gm, node):
                yield from execution_order(body)


def body_operands(node: fx.Node, body: fx.GraphModule) -> dict[fx.Node, object]:
    """Placeholder of a checkpointed body → what the node that runs it, ``checkpoint(body, *operands)``, gives it."""
    return dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))


def is_transform(node: fx.Node) -> bool:
    """Whether the node is a part that `OutlineTransforms` has made one call of."""
    return node.op == "call_function" and node.target is wrap


def is_checkpoint(node: fx.Node) -> bool:
    """Whether the node runs a nested graph under activation checkpointing."""
    return node.op == "call_function" and node.target is tag_activation_checkpoint


def all_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and the nested bodies of its operators."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "call_function":
            for body in nested_graphs(gm, node):
                yield from all_graphs(body)
