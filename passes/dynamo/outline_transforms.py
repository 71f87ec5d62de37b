"""Parts of a graph that `torch.func` transforms become one call each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap  # private; tried on 2.13 and 2.15

from fxquant.graph.nodes import is_bind
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import DYNAMO

_UNWRAPPING = frozenset({"_unwrap_for_grad", "_remove_batch_dim"})
_NESTING = "_increment_nesting", "_decrement_nesting"


class Whole(torch.nn.Module):
    """A part that runs as Dynamo wrote it. No graph of the model holds its graph: calls there have no results that
    anything reads, and dead code elimination, torch's own too, would drop them."""

    body: Callable[..., Any]

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__["body"] = body

    def forward(self, *operands: Any) -> Any:
        """The part's results, a tuple."""
        return self.body(*operands)


@dataclass(frozen=True, kw_only=True)
class OutlineTransforms(Pass):
    """``push; f; g; pop``  →  ``wrap(body, …)`` with ``body: push; f; g; pop``, for `torch.func`'s grad, vmap and jvp.

    Inside, values are wrapped for a transform, which only AOTAutograd undoes: the calls must not be seen one by one.
    """

    stages: ClassVar = (DYNAMO,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Outlines in the graph itself, whole transforms with those inside them."""
        parts = list(_transformed(gm.graph))
        for number, part in enumerate(parts):
            _outline(gm, part, f"transform_{number}")
        return len(parts)


def has_transforms(gm: fx.GraphModule) -> bool:
    """Whether there is something for `OutlineTransforms` to do."""
    return any(_depth(node) for node in gm.graph.nodes)


def _depth(node: fx.Node) -> int:
    """1 for a call that enters a transform, -1 for one that leaves it."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return int(name.endswith(_NESTING[0])) - int(name.endswith(_NESTING[1]))


def _transformed(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The parts of a graph from entering a transform to leaving it, or to the last use of what is wrapped for it."""
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    depth, begin, end = 0, -1, -1
    for index, node in enumerate(nodes):
        depth += _depth(node)
        if begin < 0 and depth:
            begin = index
        if begin < 0:
            continue
        is_plain = getattr(node.target, "__name__", "") in _UNWRAPPING
        end = max([end, index, *(order[user] for user in node.users if not is_plain)])
        if not depth and index == end:
            yield nodes[begin : index + 1]
            begin, end = -1, -1


def _outline(gm: fx.GraphModule, part: Sequence[fx.Node], name: str) -> None:
    inside = set(part)
    inputs = list(dict.fromkeys(i for n in part if not is_bind(n) for i in n.all_input_nodes if i not in inside))
    results = [node for node in part if any(user not in inside for user in node.users)]
    body = fx.Graph()
    # What a part reads of its module it keeps reading: a get_attr node is copied in and no operand.
    names = {n: body.node_copy(n) if n.op == "get_attr" else body.placeholder(n.name) for n in inputs}
    for node in part:
        if not is_bind(node):  # no site can be inside
            names[node] = body.node_copy(node, names.__getitem__)
    body.output(tuple(names[node] for node in results))
    gm.register_module(name, Whole(fx.GraphModule(gm, body)))
    with gm.graph.inserting_after(part[-1]):
        held = gm.graph.get_attr(name)
    with gm.graph.inserting_after(held):
        called = gm.graph.call_function(wrap, (held, *(node for node in inputs if node.op != "get_attr")))
    called.meta.update(_origin(part))
    for index, node in reversed(list(enumerate(results))):
        with gm.graph.inserting_after(called):
            got = gm.graph.call_function(operator.getitem, (called, index))
        got.meta.update(node.meta)
        node.replace_all_uses_with(got, delete_user_cb=lambda user: user not in inside)
    for node in reversed(part):
        gm.graph.erase_node(node)


def _origin(part: Sequence[fx.Node]) -> dict[str, Any]:
    """Where the part stands in the user's code: what its nodes have in common."""
    traced = [node.meta for node in part if node.meta.get("stack_trace")]
    stacks = [meta.get("nn_module_stack") or {} for meta in traced] or [{}]
    shared = {key: value for key, value in stacks[0].items() if all(key in stack for stack in stacks)}
    return {"nn_module_stack": shared, **({"stack_trace": traced[0]["stack_trace"]} if traced else {})}
