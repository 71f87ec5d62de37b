"""A division by a constant stays one on devices where Inductor would make a product of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.edit import call
from fxquant.graph.nodes import packet
from fxquant.passes.base import Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class KeepDivisions(Pass):
    """Post-grad graph, not on CPU: ``x / full(c)``  →  ``x / where(isnan(x), x, full(c))``, of the same value.

    A scale given as a number is such a tensor. Inductor multiplies by ``1 / c`` instead, which is rounded twice and
    puts values near ties on the other side. Numbers themselves, ``x / 3.0``, stay: CUDA multiplies by their reciprocal
    too, so for what a model itself divides by a number the product is eager's result.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Edits the graph itself."""
        done = 0
        variable: set[fx.Node] = set()
        for node in list(gm.graph.nodes):
            if node.op == "placeholder" or any(source in variable for source in node.all_input_nodes):
                variable.add(node)
            if _divides_elsewhere(node) and node.args[1] not in variable and not _is_kept(node):
                _keep(gm.graph, node)
                done += 1
        return done


def _divides_elsewhere(node: fx.Node) -> bool:
    """Whether a node is a plain quotient of two floating tensors on another device than a CPU."""
    if packet(node) not in (aten.div, aten.true_divide) or node.kwargs.get("rounding_mode"):
        return False
    if len(node.args) != 2 or not all(isinstance(operand, fx.Node) for operand in node.args):
        return False
    dividend = node.args[0].meta["val"]  # type: ignore[union-attr]
    return isinstance(dividend, torch.Tensor) and dividend.is_floating_point() and dividend.device.type != "cpu"


def _is_kept(node: fx.Node) -> bool:
    dividend, divisor = node.args
    return packet(divisor) is aten.where and divisor.args[1] is dividend  # type: ignore[arg-type, union-attr]


def _keep(graph: fx.Graph, node: fx.Node) -> None:
    dividend, divisor = node.args
    with graph.inserting_before(node):
        unknown = call(graph, aten.isnan.default, dividend, like=node)
        kept = call(graph, aten.where.self, unknown, dividend, divisor, like=node)
    node.args = (dividend, kept)
