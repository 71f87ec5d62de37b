"""``fxquant::rounding_keys``: what a step rounds its gradients by, drawn from torch's own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.gradients import ROUNDS
from fxquant.ops.library import LIBRARY

LIBRARY.define(
    "rounding_keys(int count, *, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
ROUNDING_KEYS = torch.ops.fxquant.rounding_keys.default


def _check(count: int) -> None:
    if count < 1:
        raise InvalidArgument(f"count must be at least 1: got {count}.")


def _draw(count: int, *, device: torch.device) -> Tensor:
    _check(count)
    return torch.randint(0, 2**16, (count, ROUNDS), dtype=torch.int32, device=device)


def _fake(count: int, *, device: torch.device) -> Tensor:
    _check(count)
    return torch.empty((count, ROUNDS), dtype=torch.int32, device=device)


LIBRARY.impl("rounding_keys", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fxquant::rounding_keys", _fake, lib=LIBRARY)


def rounding_keys(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys for ``count`` tensors that are rounded by chance: int32 ``[count, 6]``, each below 2^16.

    Drawn from the default generator of the device, as dropout is: the same state of it gives the same keys, so that a
    run resumes with the same bits where that state is restored (`torch.set_rng_state`). No gradient. Raises
    InvalidArgument for a count below 1.
    """
    return ROUNDING_KEYS(count, device=torch.device(device))


__all__ = ["ROUNDING_KEYS", "rounding_keys"]
