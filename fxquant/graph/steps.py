"""Where a last bit may move values far: comparisons, choices, roundings; and where numbers are drawn at random."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument
from fxquant.graph.nodes import is_float, packet

aten = torch.ops.aten

_STEPS = frozenset(
    {
        *(aten.topk, aten.sort, aten.kthvalue, aten.median, aten.mode, aten.unique_dim),
        *(aten.floor, aten.ceil, aten.round, aten.trunc, aten.sign, aten.sgn, aten.frac, aten.heaviside),
        *(aten.fmod, aten.remainder, aten.floor_divide),
    }
)
_SHAPED_LIKE = frozenset(
    {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}
)
_RANDOM_SWITCHES = ("train", "training", "dropout_p")  # operators that draw numbers where it is on


def is_step(node: fx.Node) -> bool:
    """Whether an operator may jump where its floats differ in a last bit.

    Roundings, choices of the largest, and whatever makes integers or truths of floats. Quantizers are none of them:
    a file's codes can be followed.
    """
    if node.op != "call_function" or not any(map(is_float, node.all_input_nodes)):
        return False
    value = node.meta.get("val")
    discrete = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    return packet(node) in _STEPS or (discrete and packet(node) not in _SHAPED_LIKE)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; one that is switched off does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    switches = [argument(node, name) for name in _RANDOM_SWITCHES if has_argument(node, name)]
    return not switches or any(switches)
