"""Parts of a graph that sites cannot be in: torch.func transforms, and bodies of control flow.

Before capture, `outline_transforms` makes one call of every transformed part; after it, `silence` takes the marks of
owners out of every body whose ranges no graph could update, and `unreached` says what stays float there.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap  # private; tried on 2.13 and 2.15

from fxquant.graph import is_bind, kind_of, user_line
from fxquant.plan import Declined
from fxquant.profiles import Profile
from fxquant.resolve import nested_graphs

_UNWRAPPING = frozenset({"_unwrap_for_grad", "_remove_batch_dim"})
_NESTING = "_increment_nesting", "_decrement_nesting"
_EXPORTED = frozenset({"wrap_with_autocast", "wrap_with_set_grad_enabled"})


def is_transform(node: fx.Node) -> bool:
    """Whether the node is a part that `outline_transforms` has made one call of."""
    return node.op == "call_function" and node.target is wrap


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


def outline_transforms(gm: fx.GraphModule) -> fx.GraphModule:
    """``push; f; g; pop``  →  ``wrap(body, …)`` with ``body: push; f; g; pop``, for `torch.func`'s grad, vmap and jvp.

    Inside, values are wrapped for a transform, which only AOTAutograd undoes: the calls must not be seen one by one.
    In place; returns the graph.
    """
    for number, part in enumerate(list(_transformed(gm.graph))):
        _outline(gm, part, f"transform_{number}")
    gm.recompile()
    return gm


def has_transforms(gm: fx.GraphModule) -> bool:
    """Whether there is something for `outline_transforms` to do."""
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


def is_checkpoint(node: fx.Node) -> bool:
    """Whether the node runs a nested graph under activation checkpointing."""
    return node.op == "call_function" and node.target is tag_activation_checkpoint


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


def unreached(gm: fx.GraphModule, profile: Profile) -> tuple[Declined, ...]:
    """The products in branches and loops of a graph, which a prepared model leaves in float."""
    found: list[Declined] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_checkpoint(node) or is_transform(node):
            continue
        for body in nested_graphs(gm, node):
            reason = f"the body of {node.target} cannot update a range: it stays float"
            products = [n for n in body.graph.nodes if (kind := kind_of(n)) is not None and kind.name in profile.hard]
            found += [Declined(where=n.name, reason=reason, source=user_line(n)) for n in products]
            found += unreached(body, profile)
    return tuple(found)


def dissolve_exported(gm: fx.GraphModule) -> None:
    """``wrap_with_autocast(…, body, x)``  →  the body's nodes, and so for ``wrap_with_set_grad_enabled``.

    Those are how torch.export writes ``with`` blocks; a site is wanted in them as anywhere.
    """
    done = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _EXPORTED:
            (body,) = nested_graphs(gm, node)
            dissolve_exported(body)
            index = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _held(gm, a) is body)
            _inline(gm, node, body, node.args[index + 1 :])
            done += 1
    for node in list(gm.graph.nodes) if done else ():
        unused = node.op == "get_attr" and not node.users
        if unused or getattr(node.target, "overloadpacket", None) is torch.ops.aten._assert_tensor_metadata:
            gm.graph.erase_node(node)


def _held(gm: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(gm) if node.op == "get_attr" else None


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule, operands: Sequence[Any]) -> None:
    inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
    names: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    results: Any = None
    with gm.graph.inserting_before(node):
        for old in body.graph.nodes:
            if old.op == "output":
                results = fx.node.map_arg(old.args[0], names.__getitem__)
            elif old.op != "placeholder" and (old.op != "get_attr" or old.users):
                names[old] = gm.graph.node_copy(old, names.__getitem__)
                names[old].meta = dict(old.meta)
                if old.op == "get_attr":
                    names[old].target = _moved(gm, _held(body, old))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _moved(gm: fx.GraphModule, value: Any) -> str:
    """The name under which ``gm`` now holds a constant or a nested body."""
    name = next(name for i in itertools.count() if not hasattr(gm, name := f"dissolved_{i}"))
    setattr(gm, name, value)
    return name
