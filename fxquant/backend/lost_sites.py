"""Sites that a graph binds and does not run, since Dynamo cut the frame of their owner after it was prepared."""

from __future__ import annotations

import warnings

from torch import fx

from fxquant.errors import NotQuantizedWarning
from fxquant.graph.bodies import is_checkpoint
from fxquant.plan.positions import bound_sites


def warn_of_lost(gm: fx.GraphModule, cut: bool) -> None:
    """Names the tensors that stay float: operators after a cut, and those that run in the place of planned ones."""
    found, missing = bound_sites(gm)
    if cut:
        lost = [bound.key for bound in found if len(bound.edges) < len(bound.site.edges)]
        lost += [absent.key for absent in missing]
        _warn(
            lost,
            "where a graph break parts their operators from the start of their module's forward",
            "fxquant.prepare saw no break there. Hooks that Dynamo does not trace, as those of fully_shard, make one "
            "at each module that has them: give them to larger modules, or prepare the model with them. "
            "TORCH_LOGS=graph_breaks shows where it is.",
        )
    else:
        replaced = [absent.key for absent in missing if absent.others]
        why = "Prepare the model in the mode, and on inputs, that run all that is to be quantized."
        _warn(replaced, "where their module runs other operators than those that fxquant.prepare saw", why)


def _warn(keys: list[str], where: str, why: str) -> None:
    if keys:
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        message = f"{len(keys)} quantized tensors stay float {where}: {', '.join(keys[:8])}{more}. {why}"
        warnings.warn(message, NotQuantizedWarning, stacklevel=3)


def warn_of_checkpointed(gm: fx.GraphModule) -> None:
    """Names the tensors whose operators run in checkpointed bodies that were none when their model was prepared."""
    if not any(is_checkpoint(node) for node in gm.graph.nodes):
        return
    found, missing = bound_sites(gm)
    apart = [bound.key for bound in found if bound.apart] + [absent.key for absent in missing if absent.apart]
    _warn(
        apart,
        "where checkpointing, which fxquant.prepare did not see, puts their operators into a graph of their own",
        "Turn checkpointing on first, and prepare the model in train mode.",
    )
