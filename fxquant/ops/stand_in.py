"""``fxquant::stand_in``: a value that is known already, in the place of the computation that it is the result of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxquant.ops.library import define


def _stand_in(computed: Tensor, known: Tensor) -> Tensor:
    return known.clone()


def _backward(arguments: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"computed": grad}


def _known(computed: Tensor, known: Tensor) -> Tensor:
    return known


STAND_IN = define(
    "stand_in(Tensor computed, Tensor known) -> Tensor", _stand_in, backward=_backward, saves=(), decompose=_known
)
"""``known``; its gradient goes to ``computed``, of which nothing else is used: what is traced computes it no more."""
