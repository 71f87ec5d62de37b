"""BatchNorm with batch statistics where quantizing the folded weight differs from folding the quantized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call, item
from fxquant.graph.kinds import bias_of, replace_operand, set_bias
from fxquant.graph.meta import mark_running_statistic
from fxquant.graph.views import BatchNorm
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.fold_batch_norm import Folding, as_dtype, batch_norms, fold_weight, match, own_quantizer
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FoldTrainingBatchNorm(Pass):
    """``batch_norm(conv(x, FQ(w), b))``  →  ``conv(x, FQ(w·γ/σ)) · σ/σ_B + β − γ·(μ_B − b)/σ_B``, training.

    σ is the running deviation, which deployment folds: training quantizes the very weight that is deployed, and
    the batch corrects its scale afterwards. μ_B and σ_B, both with gradient, are statistics of ``conv(x, w, b)``
    with the float weight, a second convolution of the same size; nothing is divided by γ, so that 0 works.
    The running statistics then follow μ_B and the unbiased σ_B² with the BatchNorm's momentum.

    Only where ``FQ(w·f) ≠ f·FQ(w)``, that is one scale per tensor, or scales that groups of a transposed convolution
    share; elsewhere the graph already computes this with one convolution (see `FoldBatchNorm`). A BatchNorm without
    momentum (a cumulative average) is not met: Dynamo breaks the graph before it and runs it in eager.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section 3.2.2.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites in ``gm`` and its nested bodies."""
        done = 0
        for graph in (module.graph for module in all_graphs(gm)):
            for norm in batch_norms(graph, training=True):
                found = match(norm)
                if isinstance(found, str):
                    self.decline(result, norm.node, found)
                elif not found.commutes and isinstance(norm.momentum, fx.Node):
                    self.decline(result, norm.node, "its momentum is computed in the graph")
                elif not found.commutes and found.is_moved:
                    self.decline(result, norm.node, f"{found.head.name} has its channels in another dimension")
                elif not found.commutes:
                    _rewrite(graph, found)
                    done += 1
        return done


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Nodes of the statistics of a batch: mean and biased variance with gradient, what they are taken of without."""

    mean: fx.Node
    variance: fx.Node
    seen: fx.Node
    others: tuple[int, ...]


def _rewrite(graph: fx.Graph, found: Folding) -> None:
    weight = found.weight
    # Behind what stands before the head: a BatchNorm that is called twice reads what its first call has stored.
    found = own_quantizer(graph, found)
    running, _ = fold_weight(graph, found)
    mark_running_statistic(running)
    norm = found.norm
    with graph.inserting_before(norm.node):
        batch = _statistics(graph, found, weight)
        result = _corrected(graph, found, batch, running)
        _update(graph, norm, batch)
    set_bias(found.head, None)
    norm.node.replace_all_uses_with(result)
    graph.erase_node(norm.node)


def _statistics(graph: fx.Graph, found: Folding, weight: fx.Node) -> _Batch:
    """Mean and variance per channel of the head with its float weight, in float32 at least."""
    seen = graph.node_copy(found.head, lambda node: node)
    replace_operand(seen, "weight", weight)
    value = seen.meta["val"]
    seen = as_dtype(graph, seen, torch.promote_types(value.dtype, torch.float32))
    others = tuple(d for d in range(value.dim()) if d != 1)
    both = call(graph, aten.var_mean.correction, seen, others, correction=0, like=found.norm.node)
    return _Batch(mean=item(graph, both, 1), variance=item(graph, both, 0), seen=seen, others=others)


def _corrected(graph: fx.Graph, found: Folding, batch: _Batch, running: fx.Node) -> fx.Node:
    """``head · σ/σ_B + β − γ·(μ_B − b)/σ_B``."""
    norm, head = found.norm.node, found.head
    gamma, beta = found.norm.weight, found.norm.bias
    variance = call(graph, aten.add.Scalar, batch.variance, found.norm.eps, like=norm)
    inverse = call(graph, aten.rsqrt.default, variance, like=norm)
    ratio = call(graph, aten.mul.Tensor, call(graph, aten.sqrt.default, running, like=norm), inverse, like=norm)
    slope = inverse if gamma is None else call(graph, aten.mul.Tensor, gamma, inverse, like=norm)
    # The bias is in the mean and leaves it here again: no effect on the result, but a gradient, of 0, as it had.
    bias = bias_of(found.head)
    mean = batch.mean if bias is None else call(graph, aten.sub.Tensor, batch.mean, bias, like=norm)
    shift = call(graph, aten.neg.default, call(graph, aten.mul.Tensor, mean, slope, like=norm), like=norm)
    shift = shift if beta is None else call(graph, aten.add.Tensor, shift, beta, like=norm)
    shape = [1, -1] + [1] * (head.meta["val"].dim() - 2)
    ratio, shift = (call(graph, aten.view.default, each, shape, like=norm) for each in (ratio, shift))
    result = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, head, ratio, like=norm), shift, like=norm)
    return as_dtype(graph, result, norm.meta["val"].dtype)


def _update(graph: fx.Graph, norm: BatchNorm, batch: _Batch) -> None:
    """``r ← (1 − momentum)·r + momentum·batch``, with the unbiased variance."""
    like, momentum = norm.node, norm.momentum
    assert isinstance(momentum, int | float)
    # A second reduction, of what has no gradient: sizes may be symbols, by which no correction could be computed.
    seen = call(graph, aten.detach.default, batch.seen, like=like)
    unbiased = call(graph, aten.var.correction, seen, batch.others, correction=1, like=like)
    mean = call(graph, aten.detach.default, batch.mean, like=like)
    for statistic, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        kept = call(graph, aten.mul.Scalar, statistic, 1 - momentum, like=like)
        moved = call(graph, aten.add.Tensor, kept, new, alpha=momentum, like=like)
        call(graph, aten.copy_.default, statistic, moved, like=like)
