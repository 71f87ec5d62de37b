"""Second moments of what weights are multiplied by: all that the error of a rounded product depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.products import Product, products_of
from fxquant.ptq.running import Seen


class Moments:
    """``H = Σ x xᵀ`` over the vectors that each quantized weight meets, ``[groups, K, K]`` in float64, by key.

    ‖(W − Q)·x‖² over all vectors is ``tr((W − Q) H (W − Q)ᵀ)``, so that no vector is kept. The inputs are those of the
    quantized model.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def watch(self, graph: BoundGraph) -> dict[fx.Node, Seen]:
        """What `Running.run` asks for."""
        return {
            product.node: self._seen(product)
            for product in products_of(graph)[0]
            if product.why_no_codes() is None and product.why_no_matrix() is None
        }

    def _seen(self, product: Product) -> Seen:
        def add(value: Callable[[fx.Node], Any], _: Any) -> None:
            x = product.vectors(value(product.input))
            x = x if x.dtype == torch.float64 else x.float()
            # A batch is summed in float32, at half the time and memory: the damping is 10⁴ times what that rounds off.
            sums = (x.transpose(1, 2) @ x).double()
            before = self.sums.get(product.key)
            self.sums[product.key] = sums if before is None else before + sums

        return add


def relative_error(difference: Tensor, whole: Tensor, moments: Tensor) -> float:
    """``‖(W − Q)·x‖ / ‖W·x‖`` over all vectors, of matrices ``[groups, rows, K]``."""
    error, size = (float((m @ moments * m).sum().clamp(min=0)) for m in (difference.double(), whole.double()))
    return (error / size) ** 0.5 if size else 0.0
