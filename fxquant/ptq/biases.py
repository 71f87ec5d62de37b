"""Where what is added to a product's channels can be changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument
from fxquant.graph.moves import CASTS
from fxquant.graph.nodes import packet
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.products import Product

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Bias:
    """A parameter that the channels of a result move with: by ``slope`` for 1, in float64."""

    tensor: Tensor
    slope: Tensor


def bias_of(product: Product) -> Bias | str:
    """What a product's result moves with; the reason where there is nothing.

    That is the bias itself, or where BatchNorm is folded, ``(b − μ)·f + β``, its β, or without one b.
    """
    graph, node = product.graph, product.bias
    if node is None:
        return "it has no bias"
    if packet(product.node) is aten.addmm and argument(product.node, "beta") != 1:
        return "its bias is multiplied by beta"
    node = _plain(node)
    if node in graph.state:
        return _parameter(graph, node, None)
    shift = beta_of(graph, node)
    if shift is not None:
        return _parameter(graph, shift, None)
    if packet(node) is aten.mul:
        shifted, factor = node.all_input_nodes[0], node.all_input_nodes[1]
        if packet(shifted) is aten.sub and shifted.all_input_nodes[0] in graph.state:
            return _parameter(graph, shifted.all_input_nodes[0], factor)
    return "its bias is computed in the model"


def beta_of(graph: BoundGraph, node: fx.Node) -> fx.Node | None:
    """The β of ``scaled + β``, as the bias of a layer with a folded BatchNorm is."""
    if packet(node) is not aten.add or len(node.all_input_nodes) != 2:
        return None
    last = node.all_input_nodes[1]
    return last if last in graph.state else None


def gamma_of(graph: BoundGraph, factor: fx.Node) -> fx.Node | None:
    """The γ of the factor ``γ · rsqrt(σ² + eps)`` that a folded BatchNorm has of its weight, reshaped."""
    while packet(factor) in (aten.view, aten.reshape, aten.expand) or packet(factor) in CASTS:
        factor = factor.all_input_nodes[0]
    if packet(factor) is not aten.mul:
        return None
    gamma, deviation = factor.all_input_nodes
    return gamma if gamma in graph.state and packet(deviation) is aten.rsqrt else None


def _plain(node: fx.Node) -> fx.Node:
    """The bias without its rounding to the units of an integer kernel, and without casts."""
    while node.target is FAKE_QUANTIZE_BIAS or packet(node) in CASTS:
        node = node.all_input_nodes[0]
    return node


def plain_bias(product: Product) -> fx.Node | None:
    """What is added, before it is rounded; None for nothing."""
    return None if product.bias is None else _plain(product.bias)


def _parameter(graph: BoundGraph, node: fx.Node, factor: fx.Node | None) -> Bias | str:
    tensor = graph.state[node]
    if not isinstance(tensor, torch.nn.Parameter) or tensor.dim() != 1:
        return "its bias is no parameter with a number for each channel"
    slope = torch.ones(len(tensor), dtype=torch.float64, device=tensor.device)
    if factor is not None:
        slope = graph.value(factor).double()
    return Bias(tensor, slope)
