"""What nodes of joint and later graphs cost: computed element by element or not, dear or not, how large."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from fxquant.graph.nodes import packet

# Dearer than to write a float and read it again.
_HEAVY = frozenset(
    {
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh"),
        *("digamma", "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "gelu"),
        *("hardswish", "lgamma", "log", "log10", "log1p", "log2", "mish", "pow", "sigmoid"),
        *("silu", "sin", "sinh", "softplus", "tan", "tanh"),
    }
)

_SYMBOL = 64  # the size that a symbolic dimension is taken for where sizes are compared
_SMALLER = 16


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes element by element."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_heavy(node: fx.Node) -> bool:
    """Whether a pointwise node costs more than to store its result."""
    return is_pointwise(node) and packet(node).__name__ in _HEAVY


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
