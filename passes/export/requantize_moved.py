"""Values that were moved are quantized where they are read: the runtime then moves, and multiplies, integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.moves import PADS, REPEATING, is_agnostic
from fxquant.graph.nodes import call_nodes, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.pairs import is_quantized_again, pair_before, quantized_again
from fxquant.passes.stages import EXPORT

_POOLS = (torch.ops.aten.max_pool1d, torch.ops.aten.max_pool2d, torch.ops.aten.max_pool3d)
_VOLUME_POOLS = (torch.ops.aten.max_pool3d, torch.ops.aten.max_pool3d_with_indices)


@dataclass(frozen=True, kw_only=True)
class RequantizeMoved(Pass):
    """``expand(QDQ(x))``  →  ``QDQ(expand(QDQ(x)))`` with the same scale, which gives the same codes.

    onnxruntime moves no DequantizeLinear across operators that repeat values; across the others it does.
    ``pads``: after pads as well, for runtimes that pad floats only. ``volume_pools``: after max pools over three
    dimensions, ``pools`` after all.
    """

    stages: ClassVar = (EXPORT,)

    pads: bool = False
    volume_pools: bool = False
    pools: bool = False

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Quantizes after expansions, nearest upsampling and pads."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            stops = packet(node) in REPEATING or (self.pads and packet(node) in PADS and is_agnostic(node))
            stops |= self.volume_pools and packet(node) in _VOLUME_POOLS
            stops |= self.pools and packet(node) in _POOLS
            pair = pair_before(node.all_input_nodes[0]) if stops else None
            if pair is not None and not is_quantized_again(node, pair):
                users = list(node.users)
                again = quantized_again(node, pair)
                for user in users:
                    user.replace_input_with(node, again)
                done += 1
        return done
