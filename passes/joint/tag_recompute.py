"""What the partitioner keeps for backward around fake-quants: small things saved, large ones computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.meta import is_saved_as_codes
from fxquant.graph.nodes import packet
from fxquant.graph.views import FakeQuant, Item
from fxquant.ops.learned import LEARNED_START
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import JOINT


@dataclass(frozen=True, kw_only=True)
class TagRecompute(Pass):
    """Joint graph: fake-quant results are recomputed in backward, their scales and zero points are saved.

    - The clip mask is a function of the float input, which backward needs anyway to rebuild the result; no mask
      and no second copy is kept.
    - Scales come from ranges that the same step updates: read again in backward, they would be the new ones.
    - What a trained range starts with is saved too: the same step stores it, and a search is not made twice.
    - Zero points that are constants are made again: weights of several layers that read one saved tensor would be
      quantized in one loop, which is another one for each few layers.
    - Nodes in the user's own checkpoint regions keep the user's tags, except for those few scale values.
    """

    stages: ClassVar = (JOINT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Sets ``meta["recompute"]``."""
        done = 0
        for node in gm.graph.nodes:
            if node.target is LEARNED_START:
                for each in (node, *node.users):
                    done += _tag(each, CheckpointPolicy.MUST_SAVE, override=True)
            site = FakeQuant.of(node)
            if site is None:
                continue
            for parameter in (site.scale, site.zero_point):
                if isinstance(parameter, fx.Node) and packet(parameter) is torch.ops.aten.full:
                    done += _tag(parameter, CheckpointPolicy.MUST_RECOMPUTE, override=False)
                elif isinstance(parameter, fx.Node) and parameter.op != "placeholder":
                    done += _tag(parameter, CheckpointPolicy.MUST_SAVE, override=True)
                    part = Item.of(parameter)
                    if part is not None:  # the partitioner looks at the op with several results
                        done += _tag(part.source, CheckpointPolicy.MUST_SAVE, override=True)
            # Codes share their arithmetic with the fake-quant, and must not be recomputed.
            if not is_saved_as_codes(node):
                done += _tag(node, CheckpointPolicy.MUST_RECOMPUTE, override=False)
        return done


def _tag(node: fx.Node, policy: CheckpointPolicy, *, override: bool) -> int:
    known = node.meta.get("recompute")
    if known == policy or (known is not None and not override):
        return 0
    # Without an ac_graph_id: the partitioner would save what crosses from one checkpoint region into another.
    node.meta["recompute"] = policy
    return 1
