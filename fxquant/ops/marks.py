"""Operators that compute nothing, or nothing new: marks that a graph carries for those who rewrite it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.ops.library import define


def _bind(
    key: str, modes: Sequence[int], state: Sequence[Tensor], group: str | None = None, before: bool = False
) -> None:
    return None


BIND = define("bind(str key, int[] modes, Tensor[] state, str? group=None, bool before=False) -> ()", _bind)


# Nothing uses its (absent) result; without this, tracers would drop it as dead code.
torch.fx.node.has_side_effect(BIND)


def bind(
    key: str, modes: Sequence[int], state: Sequence[Tensor], group: str | None = None, before: bool = False
) -> None:
    """Marks the frame of one owner: its site list's digest, a mode per site, and their state tensors.

    ``group`` names the process group whose ranks keep equal ranges: None for all ranks, ``""`` for no other.
    ``before``: whether each tensor is quantized with the extremes that it has on all of them.
    """
    BIND(key, modes, state, group, before)


def _stand_in(computed: Tensor, known: Tensor) -> Tensor:
    return known.clone()


def _backward(arguments: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"computed": grad}


def _known(computed: Tensor, known: Tensor) -> Tensor:
    return known


STAND_IN = define(
    "stand_in(Tensor computed, Tensor known) -> Tensor", _stand_in, backward=_backward, saves=(), traced_as=_known
)
"""``known``; its gradient goes to ``computed``, of which nothing else is used: what is traced computes it no more."""


def _copy(x: Tensor, rows: int = 0) -> Tensor:
    return x.clone()


# ``rows``: how many leading dimensions the loop that stores has around the others, for reductions over these to join
# it; 0 where that does not matter.
MATERIALIZE = define("materialize(Tensor input, int rows=0) -> Tensor", _copy)
