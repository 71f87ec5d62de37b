"""Weights whose scale is taken from themselves: no code is clipped, so no clip mask is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.arguments import set_argument
from fxquant.graph.bodies import all_graphs
from fxquant.graph.nodes import call_nodes
from fxquant.graph.views import FakeQuant
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.captured.fold_batch_norm import is_scaled_by_itself
from fxquant.passes.stages import CAPTURED


@dataclass(frozen=True, kw_only=True)
class PassGradientsThrough(Pass):
    """``fake_quantize(w, s(w), 0)``  →  ``fake_quantize(w, s(w), 0, pass_through=True)``.

    With ``s = max|w| / quant_max``, rounded, ``|w| / s`` exceeds quant_max by less than a rounding error, and rounds
    to it: the clip mask is all ones, so the gradient is dy itself, and backward need not look at the weight. Where a
    weight is NaN or infinite, the mask was 0 there; its channel's output is NaN or that of an infinite scale anyway.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites in ``gm`` and its nested bodies."""
        return sum(_mark(node) for module in all_graphs(gm) for node in call_nodes(module.graph))


def _mark(node: fx.Node) -> bool:
    site = FakeQuant.of(node)
    if site is None or site.has_numbers or site.pass_through or not is_scaled_by_itself(site):
        return False
    set_argument(node, "pass_through", True)
    return True
