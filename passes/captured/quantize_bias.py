"""The bias of a quantized convolution in the units that an integer kernel adds it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call
from fxquant.graph.kinds import bias_of, kind_of, operands, set_bias
from fxquant.graph.moves import passes_values, unmoved
from fxquant.graph.nodes import call_nodes
from fxquant.graph.views import FakeQuant
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED
from fxquant.targets.profiles import Profile


@dataclass(frozen=True, kw_only=True)
class QuantizeBias(Pass):
    """``conv(FQ(x, s), FQ(w, t), b)``  →  ``conv(FQ(x, s), FQ(w, t), fake_quantize_bias(b, s, t))``.

    For targets whose convolution adds an int32 bias of scale ``s·t`` (``Profile.integer_bias``): training, evaluation
    and the file then hold the bias that the kernel adds. Behind `FoldBatchNorm`, so that a folded bias counts as one.
    """

    stages: ClassVar = (CAPTURED,)

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
    source = FakeQuant.of(unmoved(operands(conv)["input"], passes_values))
    weight = FakeQuant.of(operands(conv)["weight"])
    if source is None or weight is None or source.axis is not None or weight.axis not in (None, 0):
        return None
    if source.element is not None or weight.element is not None:  # no int32 is added to such products
        return None
    ours, its = source.scale, weight.scale
    return (ours, its) if _is_float32(ours) and _is_float32(its) else None


def _is_float32(scale: fx.Node | float) -> TypeGuard[fx.Node]:
    return isinstance(scale, fx.Node) and scale.meta["val"].dtype == torch.float32
