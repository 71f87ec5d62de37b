"""``fxquant::rounding_words``: what a step rounds a gradient by, drawn from torch's own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.gradients import WORDS
from fxquant.ops.library import LIBRARY

LIBRARY.define(
    "rounding_words(SymInt count, *, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
ROUNDING_WORDS = torch.ops.fxquant.rounding_words.default


def _draw(count: int, *, device: torch.device) -> Tensor:
    if count < 0:
        raise InvalidArgument(f"count must be at least 0: got {count}.")
    return torch.randint(0, WORDS, (count,), dtype=torch.int32, device=device)


def _fake(count: int, *, device: torch.device) -> Tensor:
    return torch.empty((count,), dtype=torch.int32, device=device)


LIBRARY.impl("rounding_words", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fxquant::rounding_words", _fake, lib=LIBRARY)


def rounding_words(count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` int32 numbers below 2^24: for a gradient [M, N], M + N of them (`fxquant.numerics.gradients.chance`).

    Drawn from the default generator of the device, as dropout is: the same state of it gives the same numbers, so that
    a run resumes with the same bits where that state is restored (`torch.set_rng_state`). No gradient. Raises
    InvalidArgument for a negative count.
    """
    return ROUNDING_WORDS(count, device=torch.device(device))


__all__ = ["ROUNDING_WORDS", "rounding_words"]
