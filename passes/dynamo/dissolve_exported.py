"""What torch.export writes for ``with`` blocks becomes the nodes inside them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.bodies import nested_graphs
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import DYNAMO

_EXPORTED = frozenset({"wrap_with_autocast", "wrap_with_set_grad_enabled"})


@dataclass(frozen=True, kw_only=True)
class DissolveExported(Pass):
    """``wrap_with_autocast(…, body, x)``  →  the body's nodes, and so for ``wrap_with_set_grad_enabled``.

    Those are how torch.export writes ``with`` blocks; a site is wanted in them as anywhere.
    """

    stages: ClassVar = (DYNAMO,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Dissolves in the graph itself, blocks with those inside them."""
        return _dissolve(gm)


def _dissolve(gm: fx.GraphModule) -> int:
    done = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _EXPORTED:
            (body,) = nested_graphs(gm, node)
            _dissolve(body)
            index = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _held(gm, a) is body)
            _inline(gm, node, body, node.args[index + 1 :])
            done += 1
    for node in list(gm.graph.nodes) if done else ():
        unused = node.op == "get_attr" and not node.users
        if unused or getattr(node.target, "overloadpacket", None) is torch.ops.aten._assert_tensor_metadata:
            gm.graph.erase_node(node)
    return done


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
