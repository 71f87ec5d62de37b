"""What `mixed` may spend, and the widths that it may spend it on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.targets.profiles import get_profile

Budget = Literal["weight_bytes", "integer_share"]


def check_budget(weight_bytes: float | None, integer_share: float | None) -> tuple[Budget, float]:
    """The one budget that is given."""
    if (weight_bytes is None) == (integer_share is None):
        given = "none" if weight_bytes is None else "both"
        raise InvalidArgument(f"mixed must be given one budget, weight_bytes or integer_share: got {given}.")
    if weight_bytes is not None:
        if not (0 < weight_bytes < math.inf):
            raise InvalidArgument(f"weight_bytes must be a positive share of the int8 bytes: got {weight_bytes}.")
        return "weight_bytes", weight_bytes
    assert integer_share is not None
    if not 0 <= integer_share <= 1:
        raise InvalidArgument(f"integer_share must be from 0 to 1: got {integer_share}.")
    return "integer_share", integer_share


def check_bits(bits: Sequence[int | None]) -> None:
    """Raises InvalidArgument for what is no list of widths."""
    wrong = [b for b in bits if b is not None and not (isinstance(b, int) and 2 <= b <= 16)]
    if wrong or not bits:
        raise InvalidArgument(f"bits must hold widths from 2 to 16, or None for float: got {list(bits)}.")


def widths_on_target(bits: Sequence[int | None], plan: Plan) -> list[int | None]:
    """Those of ``bits`` that the plan's target has, each once; InvalidArgument where it has none."""
    check_bits(bits)
    known = get_profile(plan.target).weight_bits
    widths = [b for b in dict.fromkeys(bits) if b is None or b in known]
    if not widths:
        raise InvalidArgument(
            f"bits must hold a width of target {plan.target!r}, {known.start} to {known.stop - 1}: got {list(bits)}."
        )
    return widths
