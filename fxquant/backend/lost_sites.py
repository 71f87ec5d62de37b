"""Sites that a graph binds and does not run, since Dynamo cut the frame of their owner after it was prepared."""

from __future__ import annotations

import warnings

from torch import fx

from fxquant.errors import NotQuantizedWarning
from fxquant.graph.bodies import is_checkpoint
from fxquant.plan.positions import bound_sites


def is_cut(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's ends at a graph break: the rest of its frame is in others."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def warn_of_lost(gm: fx.GraphModule) -> None:
    """Names the tensors some of whose operators run after the cut, where they stay float."""
    found, missing = bound_sites(gm)
    lost = [bound.key for bound in found if len(bound.edges) < len(bound.site.edges)]
    lost += [absent.key for absent in missing]
    if lost:
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        warnings.warn(
            f"{len(lost)} quantized tensors stay float where a graph break parts their operators from the start of "
            f"their module's forward: {', '.join(lost[:8])}{more}. fxquant.prepare saw no break there. Hooks that "
            "Dynamo does not trace, as those of fully_shard, make one at each module that has them: give them to "
            "larger modules, or prepare the model with them. TORCH_LOGS=graph_breaks shows where it is.",
            NotQuantizedWarning,
            stacklevel=2,
        )


def warn_of_checkpointed(gm: fx.GraphModule) -> None:
    """Names the tensors whose operators run in checkpointed bodies that were none when their model was prepared."""
    if not any(is_checkpoint(node) for node in gm.graph.nodes):
        return
    found, missing = bound_sites(gm)
    apart = [bound.key for bound in found if bound.apart] + [absent.key for absent in missing if absent.apart]
    if apart:
        more = f" and {len(apart) - 8} more" if len(apart) > 8 else ""
        warnings.warn(
            f"{len(apart)} quantized tensors stay float where checkpointing, which fxquant.prepare did not see, puts "
            f"their operators into a graph of their own: {', '.join(apart[:8])}{more}. Turn checkpointing on first, "
            "and prepare the model in train mode.",
            NotQuantizedWarning,
            stacklevel=2,
        )
