"""BatchNorm into the quantized convolution or linear before it, so that QAT sees the folded weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at, set_argument
from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call
from fxquant.graph.kinds import bias_of, kind_of, operands, replace_operand, set_bias
from fxquant.graph.meta import site_of
from fxquant.graph.moves import COPYING, RESHAPING
from fxquant.graph.nodes import call_nodes, only_reader, packet
from fxquant.graph.views import BatchNorm, FakeQuant, SymmetricQparams, qparams_of
from fxquant.ops.qparams import WEIGHT_SCALE_FLOOR
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.site_nodes import grouped_value
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """``batch_norm(conv(x, FQ(w), b))``  →  ``conv(x, FQ(w·f), (b − μ)·f + β)`` with ``f = γ / √(σ² + eps)``.

    That is the graph with running statistics: eval, and training with frozen statistics. It holds for convolutions,
    transposed convolutions and linears whose weight has its scale, or scales, from itself, or a trained one for each
    channel, which is then multiplied by |f|; also where a transpose or reshape that keeps the channels whole stands
    before the BatchNorm. In training with batch statistics the graph stays as it is where ``Folding.commutes``, and
    `FoldTrainingBatchNorm` rewrites the rest: with one symmetric scale per output channel, taken from the current
    weight or trained, ``FQ(w·f) = f·FQ(w)`` in exact arithmetic (codes only change sign with f), so
    ``batch_norm(conv(x, FQ(w)))`` already scales the quantized folded weight by ``σ_running / σ_batch`` without ever
    dividing by γ.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Folds in ``gm`` and its nested bodies."""
        done = 0
        for graph in (module.graph for module in all_graphs(gm)):
            for norm in list(batch_norms(graph, training=False)):
                found = match(norm)
                if isinstance(found, str):
                    self.decline(result, norm.node, found)
                    continue
                _rewrite(graph, found)
                done += 1
        return done


@dataclass(frozen=True, kw_only=True)
class Folding:
    """``norm(move(head(x, quantized)))``, to be folded. ``axis`` holds the output channels of the weight."""

    norm: BatchNorm
    head: fx.Node
    quantized: FakeQuant
    axis: int

    @property
    def weight(self) -> fx.Node:
        """The float weight."""
        return self.quantized.input

    @property
    def groups(self) -> int:
        """Output channels per index of ``axis``: above 1 in a transposed convolution with groups only."""
        if packet(self.head) is aten.linear:
            return 1
        return int(self.head.meta["val"].shape[1]) // int(self.weight.meta["val"].shape[self.axis])

    @property
    def commutes(self) -> bool:
        """Whether ``FQ(w·f) = f·FQ(w)``: every output channel has a scale that it shares with no other."""
        return self.quantized.axis == self.axis and self.groups == 1

    @property
    def is_moved(self) -> bool:
        """Whether something stands between head and norm: a transpose, a flatten."""
        return self.norm.input is not self.head


def batch_norms(graph: fx.Graph, *, training: bool) -> list[BatchNorm]:
    """The BatchNorms of a graph that use statistics of the batch (``training``), or the running ones."""
    found = (BatchNorm.of(node) for node in call_nodes(graph))
    return [norm for norm in found if norm is not None and norm.training == training]


def match(norm: BatchNorm) -> Folding | str:
    """What can be folded, or why it cannot."""
    head, channels = _head(norm)
    kind = kind_of(head)
    weight = None if kind is None or kind.weight is None else operands(head).get(kind.weight)
    if weight is not None and grouped_value(weight) is not None:
        return "the weight before it has a scale per group: it is not folded into"
    quantized = FakeQuant.of(weight)
    if kind is None or quantized is None:
        return f"{head.name} before it has no quantized weight"
    if kind.name not in ("conv", "conv_transpose") and packet(head) is not aten.linear:
        return f"{head.name} before it is neither a convolution nor a linear"
    assert kind.weight_axis is not None
    dims = head.meta["val"].dim()
    if channels != (1 if kind.name != "linear" else dims - 1) or (kind.name != "linear" and _is_batchless(head)):
        return f"{head.name} has its channels in another dimension"
    if only_reader(head) is None:
        return f"{head.name} is used without its normalization too"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics to fold"
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(each is not None and each.op == "call_function" for each in parameters):
        return "its parameters or statistics are computed in the graph"
    found = Folding(norm=norm, head=head, quantized=quantized, axis=kind.weight_axis)
    return found if is_scaled_by_itself(quantized) else _why_not_rescaled(found) or found


def _why_not_rescaled(found: Folding) -> str | None:
    """Why a scale that is not the weight's own cannot be folded into with it: ``FQ(w·f, s·|f|) ≠ f·FQ(w, s)``."""
    site = site_of(found.quantized.node)
    if site is None or not site.spec.range.trained:
        return "the weight before it has no scale taken from itself"
    if not found.commutes:
        return "the weight before it has a trained scale that several channels share: it is not folded into"
    if found.quantized.quant_min != -found.quantized.quant_max:
        return "the weight before it has a lowest code without a mirror, for factors below 0: set narrow=True"
    return None


def _is_batchless(head: fx.Node) -> bool:
    return bool(head.meta["val"].dim() != operands(head)["weight"].meta["val"].dim())


def _head(norm: BatchNorm) -> tuple[fx.Node, int]:
    """What a BatchNorm normalizes, seen through ops that only move it, and its dimension of channels there."""
    value, channels = norm.input, 1
    while kind_of(value) is None and only_reader(value) is not None and value.all_input_nodes:
        source = value.all_input_nodes[0]
        before = _channels_before(value, source, channels)
        if before is None:
            break
        value, channels = source, before
    return value, channels


def _channels_before(node: fx.Node, source: fx.Node, channels: int) -> int | None:
    """The dimension of an op's operand that becomes ``channels`` of its result, whole; None where none does."""
    name = packet(node)
    shapes = [getattr(n.meta.get("val"), "shape", ()) for n in (node, source)]
    dims = len(shapes[1])
    if name in COPYING:
        return channels
    if name is aten.transpose:
        one, two = (int(argument_at(node, index)) % dims for index in (1, 2))
        return {one: two, two: one}.get(channels, channels)
    if name is aten.permute:
        return int(argument(node, "dims")[channels]) % dims
    trailing = len(shapes[0]) - channels
    if name in RESHAPING and dims >= trailing and list(shapes[0][channels:]) == list(shapes[1][dims - trailing :]):
        return dims - trailing
    return None


def is_scaled_by_itself(quantized: FakeQuant) -> bool:
    """Whether a fake-quant's scale is that of the tensor which it quantizes."""
    pair = qparams_of(quantized.scale)
    if not isinstance(pair, SymmetricQparams):
        return False
    return packet(pair.input) is aten.detach and pair.input.all_input_nodes == [quantized.input]


def own_quantizer(graph: fx.Graph, found: Folding) -> Folding:
    """The weight's fake-quant chain, repeated before this one use: others, if any, see the weight unfolded."""
    copies: dict[fx.Node, fx.Node] = {}
    chain = _chain(found.quantized)
    with graph.inserting_before(found.head):
        for node in chain:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    quantized = copies[found.quantized.node]
    replace_operand(found.head, "weight", quantized)
    for node in reversed(chain):
        if not node.users:
            graph.erase_node(node)
    return dataclasses.replace(found, quantized=FakeQuant(quantized))


def _chain(quantized: FakeQuant) -> list[fx.Node]:
    scale, zero_point, pair = quantized.scale, quantized.zero_point, qparams_of(quantized.scale)
    if pair is None:  # a scale that is trained, and stays what others read
        return [quantized.node]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node) and isinstance(pair, SymmetricQparams)
    return [pair.input, pair.node, scale, zero_point, quantized.node]


def fold_weight(graph: fx.Graph, found: Folding) -> tuple[fx.Node, fx.Node]:
    """Puts ``w·f`` before the weight's quantizer; the nodes of ``σ² + eps`` and of f."""
    norm, weight, (first, *_) = found.norm, found.weight, _chain(found.quantized)
    like, gamma = norm.node, norm.weight
    with graph.inserting_before(first):
        variance = call(graph, aten.add.Scalar, norm.running_var, norm.eps, like=like)
        deviation = call(graph, aten.rsqrt.default, variance, like=like)
        factor = deviation if gamma is None else call(graph, aten.mul.Tensor, gamma, deviation, like=like)
        folded = call(graph, aten.mul.Tensor, weight, _along_weight(graph, found, factor), like=weight)
        # Under autocast or in half precision the statistics are float32: the weight keeps its own dtype.
        folded = as_dtype(graph, folded, weight.meta["val"].dtype)
        if first is found.quantized.node:
            set_argument(first, "scale", _rescaled(graph, found, factor))
    first.replace_input_with(weight, folded)
    found.quantized.node.replace_input_with(weight, folded)
    return variance, factor


def _along_weight(graph: fx.Graph, found: Folding, factor: fx.Node) -> fx.Node:
    """One factor per output channel, shaped to multiply the weight.

    A transposed convolution's weight is ``[in, out / groups, …]``, and group g of the input channels makes group g
    of the output channels: ``w[i, o]`` gets the factor of channel ``g · out / groups + o``.
    """
    like, weight, groups = found.norm.node, found.weight.meta["val"], found.groups
    ones = [1] * (weight.dim() - found.axis - 1)
    if groups == 1:
        return call(graph, aten.view.default, factor, [1] * found.axis + [-1, *ones], like=like)
    rows, columns = weight.shape[:2]
    by_group = call(graph, aten.view.default, factor, [groups, 1, columns], like=like)
    repeated = call(graph, aten.expand.default, by_group, [groups, rows // groups, columns], like=like)
    return call(graph, aten.reshape.default, repeated, [rows, columns, *ones], like=like)


def _rescaled(graph: fx.Graph, found: Folding, factor: fx.Node) -> fx.Node:
    """``s·|f|``, by which ``w·f`` has the codes of ``w`` by s; f gets no gradient by it, and has that of the weight."""
    like, scale = found.quantized.node, found.quantized.scale
    reach = call(graph, aten.abs.default, call(graph, aten.detach.default, factor, like=like), like=like)
    product = call(graph, aten.mul.Tensor, scale, as_dtype(graph, reach, torch.float32), like=like)
    return call(graph, aten.clamp_min.default, product, WEIGHT_SCALE_FLOOR, like=like)


def as_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node itself, or a cast of it."""
    return node if node.meta["val"].dtype == dtype else call(graph, aten.to.dtype, node, dtype, like=node)


def _rewrite(graph: fx.Graph, found: Folding) -> None:
    if len(found.quantized.node.users) > 1:
        found = own_quantizer(graph, found)
    norm, head, bias = found.norm, found.head, bias_of(found.head)
    like, beta, mean = norm.node, norm.bias, norm.running_mean
    _, factor = fold_weight(graph, found)
    with graph.inserting_before(head):
        if bias is not None:
            shifted = call(graph, aten.sub.Tensor, bias, mean, like=like)
        else:
            shifted = call(graph, aten.neg.default, mean, like=like)
        scaled = call(graph, aten.mul.Tensor, shifted, factor, like=like)
        new_bias = scaled if beta is None else call(graph, aten.add.Tensor, scaled, beta, like=like)
        new_bias = as_dtype(graph, new_bias, (head if bias is None else bias).meta["val"].dtype)
    set_bias(head, new_bias)
    like.replace_all_uses_with(norm.input)
    graph.erase_node(like)
