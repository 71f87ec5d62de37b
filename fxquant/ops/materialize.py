"""``fxquant::materialize``: its operand, which a compiler is told to store."""

from __future__ import annotations

from torch import Tensor

from fxquant.ops.library import define


def _copy(x: Tensor, rows: int = 0) -> Tensor:
    return x.clone()


# ``rows``: how many leading dimensions the loop that stores has around the others, for reductions over these to join
# it; 0 where that does not matter.
MATERIALIZE = define("materialize(Tensor input, int rows=0) -> Tensor", _copy, decompose=False)
