"""A joint graph of forward and backward, read once: which nodes run when, and what backward has anyway."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

import sympy
import torch
from torch import fx

from fxquant.graph.edit import mutates
from fxquant.graph.nodes import packet
from fxquant.ops import fake_quantize

aten = torch.ops.aten

_MOVES = frozenset(
    {
        *(
            aten.view,
            aten.reshape,
            aten._unsafe_view,
            aten.permute,
            aten.transpose,
            aten.t,
            aten.expand,
            aten.unsqueeze,
        ),
        *(aten.squeeze, aten.alias, aten.detach, aten.clone, aten.select, aten.slice, aten.unbind, aten.split),
        *(aten.split_with_sizes, aten.flatten, aten.unflatten, torch.ops.prims.convert_element_type, aten._to_copy),
    }
)

# Dearer than to write a float and read it again.
_HEAVY = frozenset(
    {
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "digamma", "elu", "erf", "erfc"),
        *(
            "erfinv",
            "exp",
            "exp2",
            "expm1",
            "gelu",
            "hardswish",
            "lgamma",
            "log",
            "log10",
            "log1p",
            "log2",
            "mish",
            "pow",
        ),
        *("sigmoid", "silu", "sin", "sinh", "softplus", "tan", "tanh"),
    }
)

_SYMBOL = 64  # the size that a symbolic dimension is taken for where sizes are compared
_SMALLER = 16


def is_moving(node: fx.Node) -> bool:
    """Whether a node hands on its first operand's values: a view, a copy, a cast, or a part of several."""
    if node.op != "call_function":
        return False
    return node.target is operator.getitem or packet(node) in _MOVES


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes element by element."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_heavy(node: fx.Node) -> bool:
    """Whether a pointwise node costs more than to store its result."""
    return is_pointwise(node) and packet(node).__name__ in _HEAVY


class Joint:
    """``forward``: nodes that the model's outputs or mutations need. All others run in backward, or nowhere."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.tangents = [n for n in graph.nodes if n.op == "placeholder" and str(n.target).startswith("tangents")]
        behind = set(self.tangents)
        for node in graph.nodes:
            if node.op != "output" and any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        ends = [n for n in graph.output_node().all_input_nodes if n not in behind]
        ends += [n for n in graph.nodes if n.op == "call_function" and n not in behind and mutates(n)]
        needed: set[fx.Node] = set(ends)
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.forward = {node: None for node in graph.nodes if node in needed}
        self.behind_tangents = behind

    def only_backward(self) -> Iterator[fx.Node]:
        """Nodes that forward does not need."""
        return (n for n in self.graph.nodes if n.op == "call_function" and n not in self.forward)

    def wanted(self, skip: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Forward's values that backward reads or computes again from what it reads.

        A fake-quant node is one as itself, not by what it is computed from. What only a fake-quant's gradient reads as
        its input is none, nor is what nodes read that ``skip`` names.
        """
        found: set[fx.Node] = set()
        stack = [source for node in self.only_backward() if not skip(node) for source in _read(node)]
        while stack:
            node = stack.pop()
            if node in found or node not in self.forward:
                continue
            found.add(node)
            if node.target not in fake_quantize.FAKE_QUANTIZE and (is_moving(node) or is_pointwise(node)):
                stack += node.all_input_nodes
        return found

    def kept(self, wanted: set[fx.Node]) -> set[fx.Node]:
        """Values that backward has anyway, or gets from such values by pointwise steps, none of them a fake-quant.

        A GELU counts too: computed again from its input, which its own gradient reads, it took a transformer's step as
        long as its codes did (1.07 and 1.08 of plain), and an eighth less was kept.
        """
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.target in fake_quantize.FAKE_QUANTIZE:
                continue
            if node.op == "placeholder" or node in wanted or _is_cheap(node, found):
                found.add(node)
        return found


def _read(node: fx.Node) -> list[fx.Node]:
    if node.target in fake_quantize.BACKWARD:
        return [source for source in node.all_input_nodes if source is not node.args[1]]
    return node.all_input_nodes


def _is_cheap(node: fx.Node, found: set[fx.Node]) -> bool:
    if not is_moving(node) and not is_pointwise(node):
        return False
    return all(source in found or is_small(source, node) for source in node.all_input_nodes)


def is_small(source: fx.Node, node: fx.Node) -> bool:
    """Whether a value, as a mean per channel, is worth no thought beside the one that it is for."""
    of_source, of_node = elements(source), elements(node)
    return of_source is not None and of_node is not None and of_source * _SMALLER <= of_node


def elements(node: fx.Node) -> int | None:
    """How many a node's tensor has, for comparisons: without a look at what a symbolic size is."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None  # several tensors
    return math.prod(size if isinstance(size, int) else _supposed(size) for size in value.shape)


def _supposed(size: torch.SymInt) -> int:
    """Each symbol for itself: ``16·s0`` rows are as many as ``s0`` times 16."""
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, sympy.Integer(_SYMBOL))))
