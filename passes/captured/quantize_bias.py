"""The bias of a quantized convolution in the units that an integer kernel adds it in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call
from fxquant.graph.kinds import bias_of, kind_of, operands, set_bias
from fxquant.graph.moves import passes_values, unmoved
from fxquant.graph.nodes import call_nodes
from fxquant.ops import fake_quantize
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.passes.base import Pass, PassResult
from fxquant.targets.profiles import Profile


@dataclass(frozen=True, kw_only=True)
class QuantizeBias(Pass):
    """``conv(FQ(x, s), FQ(w, t), b)``  →  ``conv(FQ(x, s), FQ(w, t), fake_quantize_bias(b, s, t))``.

    For targets whose convolution adds an int32 bias of scale ``s·t`` (``Profile.integer_bias``): training, evaluation
    and the file then hold the bias that the kernel adds. Behind `FoldBatchNorm`, so that a folded bias counts as one.
    """

    profile: Profile

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites in ``gm`` and its nested bodies."""
        if not self.profile.integer_bias:
            return 0
        return sum(_quantize(node) for module in all_graphs(gm) for node in list(call_nodes(module.graph)))


def _quantize(node: fx.Node) -> bool:
    kind = kind_of(node)
    if kind is None or kind.name != "conv":
        return False
    bias, scales = bias_of(node), _scales(node)
    if bias is None or scales is None or bias.target is FAKE_QUANTIZE_BIAS:
        return False
    with node.graph.inserting_before(node):
        quantized = call(node.graph, FAKE_QUANTIZE_BIAS, bias, *scales, like=node)
    set_bias(node, quantized)
    return True


def _scales(conv: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of input and weight, where both are quantized, the weight per output channel or as a whole."""
    source, weight = unmoved(operands(conv)["input"], passes_values), operands(conv)["weight"]
    if source.target is not fake_quantize.PER_TENSOR or weight.target not in fake_quantize.FAKE_QUANTIZE:
        return None
    if weight.target is fake_quantize.PER_CHANNEL and weight.args[3] != 0:
        return None
    found = source.args[1], weight.args[1]
    return found if all(isinstance(scale, fx.Node) and _is_float32(scale) for scale in found) else None  # type: ignore[return-value]


def _is_float32(scale: fx.Node) -> bool:
    return bool(scale.meta["val"].dtype == torch.float32)
