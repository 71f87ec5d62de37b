"""What the partitioner keeps for backward around fake-quants: small things saved, large ones computed again."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph import packet
from fxquant.ops import fake_quantize
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint import is_pointwise
from fxquant.passes.save_quantized_activations import is_saved_as_codes

_USERS = "ac_graph_id"  # what nodes of a user's checkpoint region have, and tags of ours have not
_EXTREMES = (torch.ops.aten.amax, torch.ops.aten.amin)


@dataclass(frozen=True, kw_only=True)
class TagRecompute(Pass):
    """Joint graph: fake-quant results are recomputed in backward, their scales and zero points are saved.

    - The clip mask is a function of the float input, which backward needs anyway to rebuild the result; no mask
      and no second copy is kept.
    - Scales come from ranges that the same step updates: read again in backward, they would be the new ones.
    - What backward keeps of a weight is its extremes: a scale that is stored is a loop between that of the extremes and
      that of the values, which Inductor's C++ then does not join. A zero point that is a number takes no memory.
    - Nodes in the user's own checkpoint regions keep the user's tags, except for those few scale values.
    """

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Sets ``meta["recompute"]``."""
        done = 0
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target not in fake_quantize.FAKE_QUANTIZE:
                continue
            for parameter in (node.args[1], node.args[2]):
                extremes = _extremes(parameter)
                if extremes is not None:
                    done += _tag_between(parameter, extremes)
                elif isinstance(parameter, fx.Node) and parameter.op != "placeholder":
                    done += _tag(parameter, CheckpointPolicy.MUST_SAVE, override=True)
                    if parameter.target is operator.getitem:  # the partitioner looks at the op with several results
                        done += _tag(parameter.args[0], CheckpointPolicy.MUST_SAVE, override=True)  # type: ignore[arg-type]
            # Codes share their arithmetic with the fake-quant, and must not be recomputed.
            if not is_saved_as_codes(node):
                done += _tag(node, CheckpointPolicy.MUST_RECOMPUTE, override=False)
        return done


def _extremes(parameter: object) -> list[fx.Node] | None:
    """What a weight's scale is made of element by element, as it is of its extremes; of none is a constant."""
    if not isinstance(parameter, fx.Node) or parameter.op == "placeholder" or _USERS in parameter.meta:
        return None
    if packet(parameter) in _EXTREMES:
        return [parameter]
    if packet(parameter) is not torch.ops.aten.full and not is_pointwise(parameter):
        return None
    found = [_extremes(source) for source in parameter.all_input_nodes]
    return None if None in found else [node for each in found for node in each or ()]


def _tag_between(parameter: fx.Node, extremes: list[fx.Node]) -> int:
    if parameter in extremes:
        return _tag(parameter, CheckpointPolicy.MUST_SAVE, override=True)
    done = _tag(parameter, CheckpointPolicy.MUST_RECOMPUTE, override=False)
    return done + sum(_tag_between(source, extremes) for source in parameter.all_input_nodes)


def _tag(node: fx.Node, policy: CheckpointPolicy, *, override: bool) -> int:
    known = node.meta.get("recompute")
    if known == policy or (known is not None and not override):
        return 0
    # Without an ac_graph_id: the partitioner would save what crosses from one checkpoint region into another.
    node.meta["recompute"] = policy
    return 1
