"""Forms that runtimes fuse: matrix products with a transposed integer weight, attention written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.graph.edit import call
from fxquant.graph.kinds import operands
from fxquant.graph.moves import PADS, is_agnostic, unmoved
from fxquant.graph.nodes import call_nodes, only_user, packet
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE
from fxquant.passes.export.freeze import constant
from fxquant.targets.profiles import ONNXRUNTIME, Profile

aten = torch.ops.aten

# Ops that onnxruntime moves no DequantizeLinear across; of the others that move values, it does.
_STOPPING = frozenset({aten.expand, aten.upsample_nearest1d, aten.upsample_nearest2d})
_TRANSPOSING = frozenset({aten.transpose, aten.permute, aten.t, aten.mT})
_MATMULS = frozenset({aten.matmul, aten.bmm, aten.mm})

_PRODUCTS = _MATMULS | {
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}

_WEIGHTED = (_PRODUCTS - _MATMULS) | {aten.linear, aten.addmm}

# What stands between the scores of attention and their softmax.
_MASKING = frozenset({aten.add, aten.masked_fill, aten.where})


def canonicalize(gm: fx.GraphModule, profile: Profile = ONNXRUNTIME) -> list[str]:
    """Rewrites a frozen graph in place for a target; returns a line for each place that had to stay as it was."""
    notes: list[str] = []
    for node in list(call_nodes(gm.graph)):
        if packet(node) is aten.linear:
            _linear(gm, node, profile.bias_apart)
        elif packet(node) is aten.addmm:
            _addmm(gm, node, profile.bias_apart)
        elif packet(node) in _STOPPING or (profile.float_pads and packet(node) in PADS and is_agnostic(node)):
            _requantize_moved(gm.graph, node)
        elif packet(node) is aten.scaled_dot_product_attention:
            why = _attention(gm.graph, node)
            if why:
                notes.append(f"{node.name}: attention left to the exporter: {why}")
    if profile.bias_apart:
        for node in list(call_nodes(gm.graph)):
            if packet(node) is aten.relu:
                _relu_apart(gm, node)
            elif packet(node) in _WEIGHTED:
                _float_apart(gm, node)
    if profile.direct_operands:
        for node in list(call_nodes(gm.graph)):
            if packet(node) in (aten.mul, aten.div):
                _scale_first(gm.graph, node)
        for node in list(call_nodes(gm.graph)):
            if packet(node) in _PRODUCTS:
                _read_directly(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return notes


def _linear(gm: fx.GraphModule, node: fx.Node, bias_apart: bool) -> None:
    """``linear(x, DQ(w[N,K], axis 0), b)``  →  ``matmul(x, DQ(wᵀ[K,N], axis 1)) + b``, or ``… − (−b)``.

    Blocks, on axis 1 of w, stand on axis 0 of wᵀ.

    A Transpose behind the DQ would hide the weight from the runtime. ``bias_apart``: an addition would be merged into
    a float Gemm; the subtraction has the same value to the bit.
    """
    x, weight, bias = (*node.args, None)[:3]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE:
        return
    codes, scale, zero_point, axis, *block = weight.args
    graph = gm.graph
    with graph.inserting_before(node):
        transposed = _transposed(gm, codes)  # type: ignore[arg-type]
        other = None if axis is None else 1 - int(axis)  # type: ignore[arg-type]
        if block:
            scale, zero_point = _transposed(gm, scale), _transposed(gm, zero_point)  # type: ignore[arg-type]
        dequantized = call(graph, DEQUANTIZE, transposed, scale, zero_point, other, *block, like=weight)
        product = call(graph, aten.matmul.default, x, dequantized, like=node)
        if isinstance(bias, fx.Node):
            product = _biased(gm, product, bias, node, bias_apart)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _addmm(gm: fx.GraphModule, node: fx.Node, bias_apart: bool) -> None:
    """``addmm(b, x, DQ(w))``  →  ``matmul(x, DQ(w)) + b``, or ``… − (−b)``, as for linear."""
    bias, x, weight = node.args[:3]
    constant_bias = isinstance(bias, fx.Node) and bias.op == "get_attr"
    if node.kwargs or not constant_bias or not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE:
        return  # with alpha or beta, or a sum of two products
    with gm.graph.inserting_before(node):
        product = call(gm.graph, aten.matmul.default, x, weight, like=node)
        product = _biased(gm, product, bias, node, bias_apart)  # type: ignore[arg-type]
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)


def _biased(gm: fx.GraphModule, product: fx.Node, bias: fx.Node, node: fx.Node, apart: bool) -> fx.Node:
    if apart:
        return call(gm.graph, aten.sub.Tensor, product, _negated(gm, bias), like=node)
    return call(gm.graph, aten.add.Tensor, product, bias, like=node)


def _relu_apart(gm: fx.GraphModule, node: fx.Node) -> None:
    """``f(relu(matmul(x, y)))``  →  ``f(maximum(matmul(x, y), 0))``.

    onnxruntime takes a MatMul and its Relu for one unit, looks for a QuantizeLinear behind it, and leaves both in float
    where there is none; a maximum it takes for what it is.
    """
    product = node.args[0]
    quantized = all(user.target is QUANTIZE_DEQUANTIZE for user in node.users)
    if quantized or not isinstance(product, fx.Node) or packet(product) not in _MATMULS:
        return
    _as_maximum(gm, node, product)


def _as_maximum(gm: fx.GraphModule, relu: fx.Node, value: fx.Node) -> None:
    with gm.graph.inserting_before(relu):
        relu.replace_all_uses_with(_maximum(gm, value, 0.0, relu))
    gm.graph.erase_node(relu)


def _maximum(gm: fx.GraphModule, value: fx.Node, least: float, like: fx.Node) -> fx.Node:
    bound = torch.full((), least, dtype=like.meta["val"].dtype)
    return call(gm.graph, aten.maximum.default, value, constant(gm, f"{like.name}_least", bound, like), like=like)


def _float_apart(gm: fx.GraphModule, node: fx.Node) -> None:
    """``QDQ(conv(QDQ(x), w))`` with w in float  →  ``QDQ(maximum(conv(QDQ(x), w), lowest))``; of a relu, its maximum.

    Between two quantizers onnxruntime rounds a float weight to 8 bits with one scale of its own making, even where it
    has no integer kernel and computes in float afterwards. The maximum changes no value and parts what it looks for.
    """
    named, user = operands(node), only_user(node)
    source, weight = named.get("input"), named.get("weight")
    if source is None or weight is None or user is None or weight.target is DEQUANTIZE:
        return
    if _pair_behind(source) is None:
        return
    if packet(user) is aten.relu:
        _as_maximum(gm, user, node)
    elif user.target is QUANTIZE_DEQUANTIZE:
        with gm.graph.inserting_before(user):
            parted = _maximum(gm, node, torch.finfo(node.meta["val"].dtype).min, node)
        user.replace_input_with(node, parted)


def _requantize_moved(graph: fx.Graph, node: fx.Node) -> None:
    """``expand(QDQ(x))``  →  ``QDQ(expand(QDQ(x)))`` with the same scale, which gives the same codes."""
    pair = _pair_behind(node.all_input_nodes[0])
    if pair is not None:
        again = _quantized_again(graph, node, pair, 1.0)
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _pair_behind(value: fx.Node) -> fx.Node | None:
    """The Q/DQ pair that a value comes out of, moved at most."""
    value = unmoved(value)
    return value if value.target is QUANTIZE_DEQUANTIZE else None


def _quantized_again(graph: fx.Graph, value: fx.Node, pair: fx.Node, factor: float) -> fx.Node:
    """``QDQ(value)`` right behind a value that is ``pair``'s, moved and multiplied by ``factor``: the same codes."""
    _, scale, zero_point, quant_min, quant_max, label = pair.args
    again = (float(scale) * factor, zero_point, quant_min, quant_max, f"{label}@{value.name}")  # type: ignore[arg-type]
    with graph.inserting_after(value):
        return call(graph, QUANTIZE_DEQUANTIZE, value, *again, like=value)


def _read_directly(graph: fx.Graph, node: fx.Node) -> None:
    """``matmul(q, transpose(QDQ(k)))``  →  ``matmul(q, QDQ(transpose(QDQ(k))))``: the runtime then moves integers."""
    for value in dict.fromkeys(node.all_input_nodes[:2]):
        pair, moved = _pair_behind(value), value
        while is_agnostic(moved) and packet(moved) not in _TRANSPOSING:
            moved = moved.all_input_nodes[0]
        if pair is None or packet(moved) not in _TRANSPOSING:
            continue
        again = _quantized_again(graph, value, pair, 1.0)
        for user in [user for user in value.users if packet(user) in _PRODUCTS]:
            user.replace_input_with(value, again)


def _scale_first(graph: fx.Graph, node: fx.Node) -> None:
    """``softmax(matmul(QDQ(q, s), k) · c)``  →  ``softmax(matmul(QDQ(QDQ(q, s) · c, s·c), k))`` with equal codes."""
    product, factor = node.args[0], node.args[1]
    if not isinstance(product, fx.Node) or packet(product) not in _MATMULS or len(product.users) > 1:
        return
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf or node.kwargs or not _meets_softmax(node):
        return
    factor = 1.0 / factor if packet(node) is aten.div else float(factor)
    left, right = product.args
    pair = _pair_behind(left)  # type: ignore[arg-type]
    if pair is None or _pair_behind(right) is None:  # type: ignore[arg-type]
        return
    with graph.inserting_before(product):
        scaled = call(graph, aten.mul.Tensor, left, factor, like=left)  # type: ignore[arg-type]
    product.update_arg(0, _quantized_again(graph, scaled, pair, factor))
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _meets_softmax(node: fx.Node) -> bool:
    """Whether nothing but a mask stands between a value and its softmax."""
    user = only_user(node)
    while user is not None and packet(user) in _MASKING:
        user = only_user(user)
    return user is not None and packet(user) is aten.softmax


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
