"""A file for one card: what the card cannot run is said before the file is written."""

from __future__ import annotations

from fxquant.errors import InvalidArgument
from fxquant.onnx.precision import Precision
from fxquant.plan.plan import Plan
from fxquant.spec.quant_spec import QuantSpec
from fxquant.targets.profiles import Profile

_MATRICES = frozenset({"linear", "matmul", "einsum", "sdpa"})


def check_card(capability: str | None, plan: Plan, precision: Precision, profile: Profile) -> list[str]:
    """Notes on a file for a card of this compute capability; None is any card.

    Raises InvalidArgument where the target knows no cards, or not this one, and where the card lacks the plan's
    formats or the type of the file's float parts.
    """
    cards = profile.cards
    if capability is None:
        return []
    if cards is None:
        raise InvalidArgument(f"capability must be left out for {profile.name}: got {capability!r}.")
    cards.check(capability, profile.name)
    for what in dict.fromkeys(name for site in plan.sites for name in _formats(site.local.spec)):
        keys = [site.key for site in plan.sites if what in _formats(site.local.spec)]
        if least := cards.too_old(capability, what):
            raise InvalidArgument(
                f"capability must be at least {least} for codes of {what}: got {capability!r} for {keys[0]} and "
                f"{len(keys) - 1} more sites. Prepare the model with a recipe that this card has, such as 'int8'."
            )
    if least := cards.too_old(capability, precision.name):
        raise InvalidArgument(
            f"capability must be at least {least} for {precision.compute}, in which this file computes: got "
            f"{capability!r}. Give float_dtype=torch.float16."
        )
    kinds = [edge.kind for site in plan.sites for edge in site.local.edges]
    if (least := cards.too_old(capability, f"{precision.name} matrices")) and _MATRICES.intersection(kinds):
        raise InvalidArgument(
            f"capability must be at least {least} for matrix products in a file that computes in {precision.compute}: "
            f"got {capability!r}. Give float_dtype=torch.float16."
        )
    if capability in cards.float_convolutions and "conv" in kinds:
        return [f"{profile.name} runs convolutions in float on cards of compute capability {capability}"]
    return []


def _formats(spec: QuantSpec) -> list[str]:
    """What a card must have for a format, as `fxquant.targets.cards` calls it."""
    if spec.element is not None:
        return [spec.element]
    return [f"int{spec.bits} groups"] if spec.group_size is not None and spec.axis is not None else []
