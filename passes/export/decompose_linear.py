"""Products with a weight as MatMul and Add, the form that runtimes fuse with the integers of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes, packet
from fxquant.ops.qdq import DEQUANTIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, constant_value, negated
from fxquant.passes.export.pairs import Dequantized, named
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DecomposeLinear(Pass):
    """``linear(x, DQ(w[N,K], axis 0), b)``  →  ``matmul(x, DQ(wᵀ[K,N], axis 1)) + b``, or ``… − (−b)``.

    Blocks, on axis 1 of w, stand on axis 0 of wᵀ. The codes themselves are transposed: a Transpose after the DQ would
    hide the weight from the runtime. ``bias_apart``: the runtime would merge an addition into a float Gemm; the
    subtraction has the same value to the bit.
    """

    stages: ClassVar = (EXPORT,)

    bias_apart: bool = False

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every linear of an integer weight."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            weight = Dequantized.of(argument(node, "weight")) if packet(node) is aten.linear else None
            if weight is not None:
                x = argument(node, "input")
                with gm.graph.inserting_before(node):
                    product = call(gm.graph, aten.matmul.default, x, _turned(gm, weight), like=node)
                _finish(gm, node, product, argument(node, "bias"), self.bias_apart)
                done += 1
        if done:
            gm.graph.eliminate_dead_code()
        return done


@dataclass(frozen=True, kw_only=True)
class DecomposeAddmm(Pass):
    """``addmm(b, x, DQ(w))``  →  ``matmul(x, DQ(w)) + b``, or ``… − (−b)``, as for linear.

    A sum with factors stays; one with a tensor that is no constant does, but for ``bias_apart``.
    """

    stages: ClassVar = (EXPORT,)

    bias_apart: bool = False

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every addmm of a constant bias and an integer weight."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if packet(node) is not aten.addmm or argument(node, "alpha") != 1 or argument(node, "beta") != 1:
                continue
            bias, x, weight = (argument(node, name) for name in ("self", "mat1", "mat2"))
            if (bias.op == "get_attr" or self.bias_apart) and Dequantized.of(weight) is not None:
                with gm.graph.inserting_before(node):
                    product = call(gm.graph, aten.matmul.default, x, weight, like=node)
                _finish(gm, node, product, bias, self.bias_apart)
                done += 1
        if done:
            gm.graph.eliminate_dead_code()
        return done


def _turned(gm: fx.GraphModule, weight: Dequantized) -> fx.Node:
    """The transposed weight, dequantized."""
    scale, zero_point, axis = weight.scale, weight.zero_point, weight.axis
    code = _transposed(gm, weight.code)
    blocks = () if weight.block_size is None else (weight.block_size,)
    if blocks:
        scale, zero_point = _turned_scale(gm, scale), _transposed(gm, zero_point)
    other = None if axis is None else 1 - axis
    grid = (code, scale, zero_point, other)
    return call(gm.graph, DEQUANTIZE, *grid, *blocks, like=weight.node, **named(weight.element))


def _turned_scale(gm: fx.GraphModule, scale: fx.Node) -> fx.Node:
    """The transposed scales of blocks, which may be codes themselves."""
    held = Dequantized.of(scale)
    return _transposed(gm, scale) if held is None else _turned(gm, held)


def _finish(gm: fx.GraphModule, node: fx.Node, product: fx.Node, bias: fx.Node | None, apart: bool) -> None:
    """Adds the bias, and puts the sum in the place of the node."""
    with gm.graph.inserting_before(node):
        if bias is not None and apart:
            product = call(gm.graph, aten.sub.Tensor, product, negated(gm, bias), like=node)
        elif bias is not None:
            product = call(gm.graph, aten.add.Tensor, product, bias, like=node)
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)


def _transposed(gm: fx.GraphModule, held: fx.Node) -> fx.Node:
    return constant(gm, f"{held.target}_t", constant_value(gm, held).t(), held)
