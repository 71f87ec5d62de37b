"""A division by a constant stays one on devices where Inductor would make a product of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at, has_argument, set_argument
from fxquant.graph.edit import call
from fxquant.graph.nodes import packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import POST_GRAD

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class KeepDivisions(Pass):
    """Post-grad graph, not on CPU: ``x / full(c)``  →  ``x / where(isnan(x), x, full(c))``, of the same value.

    A scale given as a number is such a tensor. Inductor multiplies by ``1 / c`` instead, which is rounded twice and
    puts values near ties on the other side. Numbers themselves, ``x / 3.0``, stay: CUDA multiplies by their reciprocal
    too, so for what a model itself divides by a number the product is eager's result.
    """

    stages: ClassVar = (POST_GRAD,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Edits the graph itself."""
        done = 0
        variable: set[fx.Node] = set()
        for node in list(gm.graph.nodes):
            if node.op == "placeholder" or any(source in variable for source in node.all_input_nodes):
                variable.add(node)
            both = _divided_elsewhere(node)
            if both is not None and both[1] not in variable and not _is_kept(*both):
                _keep(node, *both)
                done += 1
        return done


def _divided_elsewhere(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a plain quotient of two floating tensors on another device than a CPU, None of other nodes."""
    if packet(node) not in (aten.div, aten.true_divide):
        return None
    if has_argument(node, "rounding_mode") and argument(node, "rounding_mode"):
        return None
    dividend, divisor = argument_at(node, 0), argument_at(node, 1)
    if not isinstance(dividend, fx.Node) or not isinstance(divisor, fx.Node):
        return None
    value = dividend.meta["val"]
    elsewhere = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type != "cpu"
    return (dividend, divisor) if elsewhere else None


def _is_kept(dividend: fx.Node, divisor: fx.Node) -> bool:
    return divisor.target is aten.where.self and argument(divisor, "self") is dividend


def _keep(node: fx.Node, dividend: fx.Node, divisor: fx.Node) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        unknown = call(graph, aten.isnan.default, dividend, like=node)
        kept = call(graph, aten.where.self, unknown, dividend, divisor, like=node)
    set_argument(node, "other", kept)
