"""The passes in the order in which each door runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fxquant.passes.base import Pass
from fxquant.passes.eliminate_redundant_fake_quantize import EliminateRedundantFakeQuantize
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.functionalize_activations import FunctionalizeActivations
from fxquant.passes.insert_fake_quantize import InsertFakeQuantize
from fxquant.passes.lower_fake_quantize import LowerFakeQuantize
from fxquant.passes.tag_recompute import TagRecompute
from fxquant.passes.unify_scales import UnifyScales
from fxquant.profiles import Profile
from fxquant.recipes import Recipe


def training_passes(recipe: Recipe, profile: Profile, *, stateless: bool) -> tuple[Pass, ...]:
    """On the captured graph, in compile and in export."""
    return (
        FunctionalizeActivations(),
        InsertFakeQuantize(recipe=recipe, profile=profile, stateless=stateless),
        FoldBatchNorm(),
        UnifyScales(profile=profile),
        EliminateRedundantFakeQuantize(),
    )


def joint_passes() -> tuple[Pass, ...]:
    """On AOTAutograd's joint graph of forward and backward, before it is partitioned."""
    return (TagRecompute(),)


def post_grad_passes(decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] = dict) -> tuple[Pass, ...]:
    """On Inductor's forward and backward graphs, before its own passes; ``decompositions`` is its table."""
    return (LowerFakeQuantize(decompositions=decompositions),)
