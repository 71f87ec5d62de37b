"""Attention written out: its products then read their operands from DequantizeLinear, and run on integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.moves import moves, unmoved
from fxquant.graph.nodes import call_nodes, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import known_value
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten

_KEEPING = moves("aliases", "copies", "reshapes", "ones", "permutes", "repeats")


@dataclass(frozen=True, kw_only=True)
class DecomposeAttention(Pass):
    """``sdpa(q, k, v)``  →  ``softmax(q·kᵀ · scale + mask) · v``, the scale after the product.

    The product then reads q and k straight from their DQ and runs on integers. A mask that masks nothing whatever the
    inputs are (all True, or all 0) is left out: transformers computes one of the positions alone. Declined: grouped
    queries, dropout that is on, a head size that is symbolic.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every attention that it can write out."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if packet(node) is aten.scaled_dot_product_attention:
                why = _why_not(node)
                if why is None:
                    _decompose(gm, node)
                    done += 1
                else:
                    self.decline(result, node, f"attention left to the exporter: {why}")
        return done


def _why_not(node: fx.Node) -> str | None:
    if argument(node, "enable_gqa"):
        return "grouped queries"
    if argument(node, "dropout_p"):
        return "dropout is on"
    if not isinstance(argument(node, "query").meta["val"].shape[-1], int):
        return "the head size is symbolic"
    return None


def _decompose(gm: fx.GraphModule, node: fx.Node) -> None:
    query, key, value, scale = (argument(node, name) for name in ("query", "key", "value", "scale"))
    with node.graph.inserting_before(node):
        scores = _add(node, aten.matmul.default, query, _add(node, aten.transpose.int, key, -2, -1))
        head = query.meta["val"].shape[-1]
        scores = _add(node, aten.mul.Tensor, scores, 1.0 / math.sqrt(head) if scale is None else scale)
        weights = _add(node, aten.softmax.int, _masked(gm, node, scores), -1)
        product = _add(node, aten.matmul.default, weights, value)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _masked(gm: fx.GraphModule, node: fx.Node, scores: fx.Node) -> fx.Node:
    """The scores with the mask added, or −∞ where it is False."""
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal"):
        mask = _add(node, aten.tril.default, _add(node, aten.ones_like.default, scores, dtype=torch.bool))
    if not isinstance(mask, fx.Node) or _masks_nothing(gm, mask):
        return scores
    if mask.meta["val"].dtype == torch.bool:
        return _add(node, aten.masked_fill.Scalar, scores, _add(node, aten.logical_not.default, mask), float("-inf"))
    return _add(node, aten.add.Tensor, scores, mask)


def _masks_nothing(gm: fx.GraphModule, mask: fx.Node) -> bool:
    value = known_value(gm, unmoved(mask, _repeats))
    if value is None:
        return False
    return bool(value.all() if value.dtype == torch.bool else not value.any())


def _repeats(node: fx.Node) -> bool:
    """Whether a node's values are those of its operand: what a mask is expanded to may depend on the inputs' sizes."""
    return node.op == "call_function" and packet(node) in _KEEPING


def _add(node: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return call(node.graph, op, *args, like=node, **kwargs)
