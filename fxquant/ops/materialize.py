"""``fxquant::materialize``: its operand, which a compiler is told to store."""

from __future__ import annotations

from torch import Tensor

from fxquant.ops.library import define

MATERIALIZE = define("materialize(Tensor input) -> Tensor", Tensor.clone, decompose=False)
