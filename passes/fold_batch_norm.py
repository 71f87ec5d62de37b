"""BatchNorm into the quantized convolution or linear before it, so that QAT sees the folded weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph import call_nodes, kind_of, only_user, operands, packet, replace_operand
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.base import Pass, PassResult, all_graphs, call

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """``batch_norm(conv(x, FQ(w), b))``  →  ``conv(x, FQ(w·f), (b − μ)·f + β)`` with ``f = γ / √(σ² + eps)``.

    That is the graph with running statistics: eval, and training with frozen statistics. In training with batch
    statistics the graph stays as it is, and already is the folded network with the batch correction: with one
    symmetric scale per output channel taken from the current weight, ``FQ(w·f) = f·FQ(w)`` in exact arithmetic
    (codes only change sign with f), so ``batch_norm(conv(x, FQ(w)))`` scales the quantized folded weight by
    ``σ_running / σ_batch`` without ever dividing by γ. A weight quantized in another way would break that
    identity and is declined.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Folds in ``gm`` and its nested bodies."""
        return sum(self._fold_all(module.graph, result) for module in all_graphs(gm))

    def _fold_all(self, graph: fx.Graph, result: PassResult) -> int:
        return sum(self._fold(graph, node, result) for node in list(call_nodes(graph)) if _is_batch_norm(node))

    def _fold(self, graph: fx.Graph, norm: fx.Node, result: PassResult) -> int:
        head = norm.args[0]
        assert isinstance(head, fx.Node)
        kind = kind_of(head)
        quantized = operands(head).get("weight") if kind is not None and kind.name in ("conv", "linear") else None
        if quantized is None or quantized.target not in fake_quantize.FAKE_QUANTIZE:
            self.decline(result, norm, f"{head.name} before it has no quantized weight")
            return 0
        if not _is_per_channel_of_itself(quantized):
            self.decline(result, norm, "the weight before it has no scale per output channel taken from itself")
            return 0
        if norm.args[5] is True:
            return 0  # batch statistics: see the class
        if only_user(head) is not norm:
            self.decline(result, norm, f"{head.name} is used without its normalization too")
            return 0
        if any(isinstance(a, fx.Node) and a.op == "call_function" for a in norm.args[1:5]):
            self.decline(result, norm, "its parameters or statistics are computed in the graph")
            return 0
        if packet(head) is aten.linear and head.meta["val"].dim() != 2:
            self.decline(result, norm, f"{head.name} has its channels in another dimension")
            return 0
        if len(quantized.users) > 1:
            quantized = _own_copy(graph, head, quantized)
        _rewrite(graph, head, norm, quantized)
        return 1


def _is_batch_norm(node: fx.Node) -> bool:
    return packet(node) is aten.batch_norm


def _is_per_channel_of_itself(quantized: fx.Node) -> bool:
    if quantized.target is not fake_quantize.PER_CHANNEL or quantized.args[3] != 0:
        return False
    scale = quantized.args[1]
    pair = scale.args[0] if isinstance(scale, fx.Node) else None
    return isinstance(pair, fx.Node) and pair.target is qparams.SYMMETRIC_QPARAMS


def _own_copy(graph: fx.Graph, head: fx.Node, quantized: fx.Node) -> fx.Node:
    """A shared weight's fake-quant chain, repeated for this one use: others see it unfolded."""
    copies: dict[fx.Node, fx.Node] = {}
    chain = _chain(quantized)
    with graph.inserting_before(head):
        for node in chain:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    replace_operand(head, "weight", copies[quantized])
    return copies[quantized]


def _chain(quantized: fx.Node) -> list[fx.Node]:
    scale, zero_point = quantized.args[1], quantized.args[2]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    pair = scale.args[0]
    assert isinstance(pair, fx.Node)
    detached = pair.args[0]
    assert isinstance(detached, fx.Node)
    return [detached, pair, scale, zero_point, quantized]


def _rewrite(graph: fx.Graph, head: fx.Node, norm: fx.Node, quantized: fx.Node) -> None:
    _, gamma, beta, mean, var, _, _, eps = norm.args[:8]
    weight = quantized.args[0]
    detached, *_ = _chain(quantized)
    assert isinstance(weight, fx.Node) and isinstance(var, fx.Node) and isinstance(mean, fx.Node)
    with graph.inserting_before(detached):
        deviation = call(graph, aten.rsqrt.default, call(graph, aten.add.Scalar, var, eps, like=norm), like=norm)
        factor = deviation if gamma is None else call(graph, aten.mul.Tensor, gamma, deviation, like=norm)
        shape = [-1] + [1] * (weight.meta["val"].dim() - 1)
        column = call(graph, aten.view.default, factor, shape, like=norm)
        folded = call(graph, aten.mul.Tensor, weight, column, like=weight)
        # Under autocast or in half precision the statistics are float32: the weight keeps its own dtype.
        if folded.meta["val"].dtype != weight.meta["val"].dtype:
            folded = call(graph, aten.to.dtype, folded, weight.meta["val"].dtype, like=weight)
    detached.replace_input_with(weight, folded)
    quantized.replace_input_with(weight, folded)
    with graph.inserting_before(head):
        bias = head.args[2] if len(head.args) > 2 else head.kwargs.get("bias")
        if isinstance(bias, fx.Node):
            shifted = call(graph, aten.sub.Tensor, bias, mean, like=norm)
        else:
            shifted = call(graph, aten.neg.default, mean, like=norm)
        scaled = call(graph, aten.mul.Tensor, shifted, factor, like=norm)
        new_bias = scaled if beta is None else call(graph, aten.add.Tensor, scaled, beta, like=norm)
        wanted = head.meta["val"].dtype if bias is None else bias.meta["val"].dtype  # type: ignore[union-attr]
        if new_bias.meta["val"].dtype != wanted:
            new_bias = call(graph, aten.to.dtype, new_bias, wanted, like=norm)
    if len(head.args) > 2:
        head.update_arg(2, new_bias)
    else:
        head.update_kwarg("bias", new_bias)
    norm.replace_all_uses_with(head)
    graph.erase_node(norm)
