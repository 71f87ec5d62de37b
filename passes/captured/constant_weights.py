"""Which fake-quantized weights are functions of parameters and buffers alone, and why the others are not."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph.arguments import argument
from fxquant.graph.bodies import all_graphs, body_operands, is_checkpoint, nested_graphs
from fxquant.graph.dependence import shares_memory, written_operands
from fxquant.graph.edit import is_normalization, mutates
from fxquant.graph.meta import site_of, source_of
from fxquant.graph.moves import AGNOSTIC
from fxquant.graph.nodes import call_nodes, is_state, packet
from fxquant.ops import fake_quantize, qparams
from fxquant.ops.learned import LEARNED_OPS

aten = torch.ops.aten
Reasons = dict[fx.Node, str | None]
"""Node → why it cannot be computed once for many calls, None where it can."""


# Whose results are the same with autocast on: they compute in a type of their own, or not at all.
WITHOUT_AUTOCAST = frozenset({*fake_quantize.FAKE_QUANTIZE, *qparams.QPARAM_OPS, *LEARNED_OPS, aten.detach.default})


def is_weight(node: fx.Node) -> bool:
    """Whether the node is the fake-quant of a weight's site."""
    site = site_of(node) if node.target in fake_quantize.FAKE_QUANTIZE else None
    return site is not None and site.role == "weight"


def reasons(gm: fx.GraphModule, inputs: Sequence[Any]) -> Reasons:
    """Of every node of the graph itself."""
    placeholders = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    written, overlapping = written_inputs(gm), _overlapping(placeholders)
    known = {node: _why_not_input(node, value, written, overlapping) for node, value in placeholders.items()}
    return _spread(gm.graph, known, set())


def reasons_inside(outer: fx.Node, body: fx.GraphModule, around: Reasons) -> Reasons:
    """Of every node of a checkpointed body, which ``outer`` calls with the operands after its first."""
    operands = body_operands(outer, body).items()
    known = {node: around[v] if isinstance(v, fx.Node) else f"it depends on {v}" for node, v in operands}
    return _spread(body.graph, known, set(body.graph.nodes) if outer in _switched(outer.graph) else set())


def _spread(graph: fx.Graph, known: Reasons, switched: set[fx.Node]) -> Reasons:
    switched = switched | _switched(graph)
    for node in graph.nodes:
        if node not in known:
            inherited = (why for n in node.all_input_nodes if (why := known[n]) is not None)
            known[node] = next(inherited, None) or _why_not(node, node in switched)
    return known


def _switched(graph: fx.Graph) -> set[fx.Node]:
    """The nodes between two that switch autocast."""
    found, inside = set(), 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        inside += int(name == "_enter_autocast") - int(name == "_exit_autocast")
        if inside > 0:
            found.add(node)
    return found


def _why_not(node: fx.Node, switched: bool) -> str | None:
    target = node.target
    if node.op != "call_function":
        return f"it reads {target}, a constant of the graph"
    if target is operator.getitem:
        return None
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return f"it depends on {node.name}, which is no function of its operands alone"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return f"it depends on {node.name}, which is random"
    if switched and target not in WITHOUT_AUTOCAST and packet(node) not in AGNOSTIC:
        return f"it depends on {node.name}, computed where the model switches autocast"
    return None


def _why_not_input(node: fx.Node, value: Any, written: set[fx.Node], overlapping: set[fx.Node]) -> str | None:
    if not isinstance(value, Tensor) or not is_state(node):
        return f"it depends on {_shown(node)}, which is no parameter or buffer"
    if node in overlapping:
        return f"{_shown(node)} shares its memory with another input"
    if node in written:
        return f"it depends on {_shown(node)}, which the graph itself changes"
    if not _is_plain(value):
        return f"it depends on {_shown(node)}, a {type(value).__name__} whose changes are not told"
    if not all(isinstance(size, int) for size in (*node.meta["val"].shape, *node.meta["val"].stride())):
        return f"it depends on {_shown(node)}, whose size is not fixed"
    return None


def _shown(node: fx.Node) -> str:
    return source_of(node) or node.name


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Placeholders that the graph changes, directly, through a view, or in a nested body."""
    found: set[fx.Node] = set()
    for node in call_nodes(gm.graph):
        found.update(map(_memory, _changed_by(gm, node)))
    return {node for node in found if node.op == "placeholder"}


def _changed_by(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    bodies = nested_graphs(gm, node)
    if is_checkpoint(node):
        (body,) = bodies
        written = written_inputs(body)
        operands = body_operands(node, body).items()
        return [value for inner, value in operands if inner in written and isinstance(value, fx.Node)]
    if any(mutates(n) for body in bodies for each in all_graphs(body) for n in call_nodes(each.graph)):
        return node.all_input_nodes
    if not mutates(node):
        return []
    if is_normalization(node):  # whose schema is silent about its running statistics
        statistics = (argument(node, name) for name in ("running_mean", "running_var"))
        return [value for value in statistics if isinstance(value, fx.Node)]
    return written_operands(node)


def _memory(node: fx.Node) -> fx.Node:
    """The tensor that a value is a view of."""
    while shares_memory(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _overlapping(inputs: dict[fx.Node, Any]) -> set[fx.Node]:
    """Inputs that hold bytes of another: a write to one is not told of the other."""
    spans = []
    for node, value in inputs.items():
        if _is_plain(value) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            spans.append((start, start + (last + 1) * value.element_size(), node))
    spans.sort(key=lambda span: span[:2])
    found: set[fx.Node] = set()
    farthest = spans[0] if spans else None
    for span in spans[1:]:
        assert farthest is not None
        if span[0] < farthest[1]:
            found |= {span[2], farthest[2]}
        farthest = max(farthest, span, key=lambda each: each[1])
    return found


def _is_plain(value: Any) -> bool:
    """Whether autograd's count of changes, and an address, say whether a value is what it was."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
