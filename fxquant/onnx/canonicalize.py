"""Forms that onnxruntime fuses: matrix products with a transposed integer weight, attention written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.graph import call_nodes, is_agnostic, packet
from fxquant.onnx.freeze import constant
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE
from fxquant.passes.base import call

aten = torch.ops.aten


# Ops that onnxruntime moves no DequantizeLinear across; of the others that move values, it does.
_STOPPING = frozenset({aten.expand, aten.upsample_nearest1d, aten.upsample_nearest2d})


def canonicalize(gm: fx.GraphModule) -> list[str]:
    """Rewrites a frozen graph in place; returns a line for each place that had to stay as it was."""
    notes: list[str] = []
    for node in list(call_nodes(gm.graph)):
        if packet(node) is aten.linear:
            _linear(gm, node)
        elif packet(node) is aten.addmm:
            _addmm(gm, node)
        elif packet(node) in _STOPPING:
            _requantize(gm.graph, node)
        elif packet(node) is aten.scaled_dot_product_attention:
            why = _attention(gm.graph, node)
            if why:
                notes.append(f"{node.name}: attention left to the exporter: {why}")
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return notes


def _linear(gm: fx.GraphModule, node: fx.Node) -> None:
    """``linear(x, DQ(w[N,K], axis 0), b)``  →  ``matmul(x, DQ(wᵀ[K,N], axis 1)) − (−b)``.

    A Transpose behind the DQ would hide the weight from the runtime, and an addition would be merged into a float
    Gemm; the subtraction has the same value to the bit.
    """
    x, weight, bias = (*node.args, None)[:3]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE:
        return
    codes, scale, zero_point, axis = weight.args
    graph = gm.graph
    with graph.inserting_before(node):
        transposed = _transposed(gm, codes)  # type: ignore[arg-type]
        other = None if axis is None else 1 - int(axis)  # type: ignore[arg-type]
        dequantized = call(graph, DEQUANTIZE, transposed, scale, zero_point, other, like=weight)
        product = call(graph, aten.matmul.default, x, dequantized, like=node)
        if isinstance(bias, fx.Node):
            negative = _negated(gm, bias)
            product = call(graph, aten.sub.Tensor, product, negative, like=node)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _addmm(gm: fx.GraphModule, node: fx.Node) -> None:
    """``addmm(b, x, DQ(w))``  →  ``matmul(x, DQ(w)) − (−b)``, for the same reason."""
    bias, x, weight = node.args[:3]
    constant_bias = isinstance(bias, fx.Node) and bias.op == "get_attr"
    if node.kwargs or not constant_bias or not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE:
        return  # with alpha or beta, or a sum of two products
    with gm.graph.inserting_before(node):
        product = call(gm.graph, aten.matmul.default, x, weight, like=node)
        product = call(gm.graph, aten.sub.Tensor, product, _negated(gm, bias), like=node)  # type: ignore[arg-type]
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)


def _requantize(graph: fx.Graph, node: fx.Node) -> None:
    """``expand(QDQ(x))``  →  ``QDQ(expand(QDQ(x)))`` with the same scale, which gives the same codes."""
    source = node.all_input_nodes[0]
    while is_agnostic(source):
        source = source.all_input_nodes[0]
    if source.target is not QUANTIZE_DEQUANTIZE:
        return
    *qparams, label = source.args[1:]
    with graph.inserting_after(node):
        again = call(graph, QUANTIZE_DEQUANTIZE, node, *qparams, f"{label}@{node.name}", like=node)
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _transposed(gm: fx.GraphModule, codes: fx.Node) -> fx.Node:
    return constant(gm, f"{codes.target}_t", getattr(gm, str(codes.target)).t(), codes)


def _negated(gm: fx.GraphModule, bias: fx.Node) -> fx.Node:
    if bias.op != "get_attr":
        return call(gm.graph, aten.neg.default, bias, like=bias)
    value: torch.Tensor = gm  # type: ignore[assignment]
    for part in str(bias.target).split("."):
        value = getattr(value, part)
    return constant(gm, f"{bias.target}_negated", -value.detach(), bias)


def _attention(graph: fx.Graph, node: fx.Node) -> str | None:
    """``sdpa(q, k, v)``  →  ``softmax(q·kᵀ · scale + mask) · v``, the scale behind the product.

    The product then reads q and k straight from their DQ and runs on integers.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    if given.get("enable_gqa"):
        return "grouped queries"
    if given.get("dropout_p"):
        return "dropout is on"
    head = query.meta["val"].shape[-1]
    if not isinstance(head, int):
        return "the head size is symbolic"
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(head) if scale is None else scale
    with graph.inserting_before(node):

        def add(op, *args, **kwargs):  # type: ignore[no-untyped-def]
            return call(graph, op, *args, like=node, **kwargs)

        scores = add(aten.matmul.default, query, add(aten.transpose.int, key, -2, -1))
        scores = add(aten.mul.Tensor, scores, scale)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            mask = add(aten.tril.default, add(aten.ones_like.default, scores, dtype=torch.bool))
        if isinstance(mask, fx.Node):
            if mask.meta["val"].dtype == torch.bool:
                scores = add(aten.masked_fill.Scalar, scores, add(aten.logical_not.default, mask), float("-inf"))
            else:
                scores = add(aten.add.Tensor, scores, mask)
        weights = add(aten.softmax.int, scores, -1)
        product = add(aten.matmul.default, weights, value)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return None
