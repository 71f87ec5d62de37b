"""What the partitioner keeps for backward around fake-quants: small things saved, large ones computed again."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.nodes import packet
from fxquant.ops import fake_quantize
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint.save_quantized_activations import is_saved_as_codes


@dataclass(frozen=True, kw_only=True)
class TagRecompute(Pass):
    """Joint graph: fake-quant results are recomputed in backward, their scales and zero points are saved.

    - The clip mask is a function of the float input, which backward needs anyway to rebuild the result; no mask
      and no second copy is kept.
    - Scales come from ranges that the same step updates: read again in backward, they would be the new ones.
    - Zero points that are constants are made again: weights of several layers that read one saved tensor would be
      quantized in one loop, which is another one for each few layers.
    - Nodes in the user's own checkpoint regions keep the user's tags, except for those few scale values.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Sets ``meta["recompute"]``."""
        done = 0
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target not in fake_quantize.FAKE_QUANTIZE:
                continue
            for parameter in (node.args[1], node.args[2]):
                if isinstance(parameter, fx.Node) and packet(parameter) is torch.ops.aten.full:
                    done += _tag(parameter, CheckpointPolicy.MUST_RECOMPUTE, override=False)
                elif isinstance(parameter, fx.Node) and parameter.op != "placeholder":
                    done += _tag(parameter, CheckpointPolicy.MUST_SAVE, override=True)
                    if parameter.target is operator.getitem:  # the partitioner looks at the op with several results
                        done += _tag(parameter.args[0], CheckpointPolicy.MUST_SAVE, override=True)  # type: ignore[arg-type]
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
