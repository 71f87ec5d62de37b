"""What a step read of running statistics that it then updated is saved for its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.meta import is_running_statistic
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import JOINT


@dataclass(frozen=True, kw_only=True)
class SaveRunningStatistics(Pass):
    """Joint graph: nodes that were marked are saved, in the user's checkpoint regions too.

    They are small, one number per channel. Left to itself, the partitioner computes them again in backward from
    the buffer, which by then holds the next step's statistics: gradients would silently be wrong.
    """

    stages: ClassVar = (JOINT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Sets ``meta["recompute"]``."""
        done = 0
        for node in gm.graph.nodes:
            wanted = node.op == "call_function" and is_running_statistic(node)
            if wanted and node.meta.get("recompute") != CheckpointPolicy.MUST_SAVE:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                done += 1
        return done
