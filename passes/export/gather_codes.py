"""Rows of a table are picked as codes, and only those that were picked become floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes, packet
from fxquant.ops.qdq import DEQUANTIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, constant_value
from fxquant.passes.export.pairs import Dequantized
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class GatherCodes(Pass):
    """A table is looked up before it is dequantized, whatever its scales::

        embedding(DQ(codes, s, z), i)            →  DQ(embedding(codes, i), s, z)
        embedding(DQ(codes, s, z, axis=1), i)    →  DQ(embedding(codes, i), s, z, axis=-1)
        embedding(DQ(codes, s[V], 0, axis=0), i) →  float(embedding(codes, i)) * embedding(s[V, 1], i)

    The same floats. A runtime computes a DequantizeLinear of a table in every run, since it will not store the floats:
    of BERT's words 23 million numbers for a sentence of 128. Declined: scales of rows beside zero points that are not
    0, and codes that fit 4 bits, which may be stored so, where no runtime picks rows of them. Tables in blocks stay:
    onnxruntime has an operator of their own for those.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Moves the DequantizeLinear of every table after its lookups."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            table = Dequantized.of(argument(node, "weight")) if packet(node) is aten.embedding else None
            if table is None or table.block_size is not None or table.element is not None:
                continue
            why = _why_not(gm, table)
            if why is not None:
                self.decline(result, node, why)
                continue
            _pick(gm, node, table)
            done += 1
        if done:
            gm.graph.eliminate_dead_code()
        return done


def _why_not(gm: fx.GraphModule, table: Dequantized) -> str | None:
    codes = constant_value(gm, table.code)
    if bool(((codes >= -8) & (codes <= 7)).all()):
        return "the whole table is dequantized: its codes fit 4 bits, of which no runtime picks rows"
    if table.axis == 0 and bool(constant_value(gm, table.zero_point).any()):
        return "the whole table is dequantized: each row has a zero point of its own"
    return None


def _pick(gm: fx.GraphModule, node: fx.Node, table: Dequantized) -> None:
    with gm.graph.inserting_before(node):
        rows = _lookup(node, table.code)
        if table.axis == 0:
            scale: Tensor = constant_value(gm, table.scale)
            column = constant(gm, f"{table.scale.target}_column", scale[:, None], table.scale)
            floats = call(gm.graph, aten._to_copy.default, rows, dtype=scale.dtype, like=node)
            picked = call(gm.graph, aten.mul.Tensor, floats, _lookup(node, column), like=node)
        else:
            axis = None if table.axis is None else rows.meta["val"].dim() - 1
            picked = call(gm.graph, DEQUANTIZE, rows, table.scale, table.zero_point, axis, like=node)
    node.replace_all_uses_with(picked)
    gm.graph.erase_node(node)


def _lookup(node: fx.Node, table: fx.Node) -> fx.Node:
    return call(node.graph, aten.embedding.default, table, argument(node, "indices"), like=node)
