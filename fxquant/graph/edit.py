"""Editing a graph: new nodes with their fake values, dead ones dropped, copies."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.graph.fakes import computed
from fxquant.graph.meta import REGION, copied_meta
from fxquant.graph.nodes import packet


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same attributes."""
    graph = fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, names))
    for old, new in names.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


def without_dead_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Without what a model computes for nothing: a site there would have no place in the artifact."""
    drop_dead_nodes(gm.graph)
    gm.recompile()
    return gm


def call(graph: fx.Graph, op: Any, /, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new call_function node at the insertion point, with ``val`` computed and the origin of ``like``."""
    node = graph.call_function(op, args, kwargs)
    node.meta.update(copied_meta(like, "nn_module_stack", "stack_trace", REGION))
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in _tensors((values, like.meta.get("val"))) if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise AssertionError(f"{op} has no fake operand to compute its value from")
    node.meta["val"] = computed(mode, op, *values)
    return node


def arguments_with(node: fx.Node, old: fx.Node, new: fx.Node) -> tuple[Any, Any]:
    """Arguments and keywords of a node with ``new`` in the place of ``old``."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: new if each is old else each)
    return args, kwargs


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """``node[index]`` of an op with several results."""
    got = graph.call_function(operator.getitem, (node, index))
    got.meta.update({k: v for k, v in node.meta.items() if k != "val"}, val=node.meta["val"][index])
    return got


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def drop_dead_nodes(graph: fx.Graph) -> None:
    """Dead code elimination that keeps mutations."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return is_normalization(node) or (schema is not None and schema.is_mutable)


def is_normalization(node: fx.Node) -> bool:
    """Whether a node may update running statistics, about which its schema is silent."""
    return packet(node) in (torch.ops.aten.batch_norm, torch.ops.aten.instance_norm)
