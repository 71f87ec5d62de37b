"""`correct_bias`: the mean error that quantization adds to each channel, taken off the biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.ptq.biases import Bias, bias_of
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.changes import Changes, undone_on_error
from fxquant.ptq.products import Product, Products, products_of
from fxquant.ptq.report import PtqReport, PtqRow, require_some
from fxquant.ptq.running import Running, Seen, opened
from fxquant.support.progress import track


def correct_bias(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> PtqReport:
    """Moves biases so that the mean of every product's channels is what it is in float.

    Product after product, in the order in which they run::

        b ← b + E[y] − E[y_q]

    with the means of each output channel over all data and places, y of the float model and y_q of the quantized one,
    whose biases before this product are corrected already. A BatchNorm that is folded into the product gives its β, or
    without one the product's own bias.

    Args:
        data: batches as for `fxquant.calibrate`, kept in memory: they run once in float, and quantized for each
            product.
        progress: draw a bar on a terminal.

    Ranges should be set before. Products without a bias are left alone, as the report says. Only biases change, and
    after an error all of them are as they were. Raises InvalidArgument for an unprepared model, no data, or no
    quantized product with a bias.

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction" (2019), section 4.2.
    """
    batches = list(data)
    with opened(model, "correct_bias") as running, undone_on_error() as changes:
        exact, start = (_means(running, batches, quantized, progress) for quantized in (False, True))
        products = Products(running.graphs)
        biases, declined = _biases(products, exact)
        require_some("correct_bias", biases, "quantized products with a bias", declined.items())
        for key in track(list(biases), "correct_bias: products", show=progress):
            found = _means(running, batches, True, False, only=key)
            _move(changes, biases[key], exact[key] - found[key])
        end = _means(running, batches, True, progress)
    rows = [
        PtqRow(key=key, before=_size(start[key] - exact[key]), after=_size(end[key] - exact[key])) for key in biases
    ]
    measure = "error of the mean of the product's channels, √Σ (E[y_q] − E[y])²"
    return PtqReport(method="correct_bias", measure=measure, rows=tuple(rows), declined=tuple(declined.items()))


def _biases(products: Products, ran: Iterable[str]) -> tuple[dict[str, Bias], dict[str, str]]:
    found: dict[str, Bias] = {}
    declined = dict(products.declined)
    for key in ran:
        bias = bias_of(products.all[key])
        other = None if isinstance(bias, str) else products.other_reader(bias.tensor, key)
        if isinstance(bias, str):
            declined[key] = bias
        elif other is not None:
            declined[key] = f"{other} reads the same bias"
        else:
            found[key] = bias
    return found, declined


def _move(changes: Changes, bias: Bias, difference: Tensor) -> None:
    """By what moves the result by ``difference``; a channel that it does not move stays, as one of no finite mean."""
    step = difference / bias.slope
    step = torch.where(step.isfinite(), step, 0.0)
    changes.put(bias.tensor, bias.tensor.detach().double() + step)


def _size(difference: Tensor) -> float:
    return float(difference.square().sum().sqrt())


def _means(
    running: Running, batches: list[Any], quantized: bool, progress: bool, only: str | None = None
) -> dict[str, Tensor]:
    """The mean of each channel of the products with a quantized operand, by key; ``only`` of one product."""
    means = Means(only)
    what = "correct_bias: quantized" if quantized else "correct_bias: float"
    running.over(batches, lambda batch: running.run(batch, means.watch, quantized=quantized), what, progress)
    return {key: total / means.counts[key] for key, total in means.sums.items()}


class Means:
    """Sums of each output channel of products, in float64, and of how many values; by key."""

    def __init__(self, only: str | None = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._only = only

    def watch(self, graph: BoundGraph) -> dict[fx.Node, Seen]:
        """What `Running.run` asks for."""
        return {
            product.end: self._seen(product)
            for product in products_of(graph)[0]
            if product.is_quantized and self._only in (None, product.key)
        }

    def _seen(self, product: Product) -> Seen:
        def add(_: Callable[[fx.Node], Any], result: Tensor) -> None:
            channel = product.channel_dim(product.end) % result.dim()
            others = [dim for dim in range(result.dim()) if dim != channel]
            total = result.double().sum(others) if others else result.double()
            self.sums[product.key] = self.sums.get(product.key, 0) + total
            self.counts[product.key] = self.counts.get(product.key, 0) + result.numel() // result.shape[channel]

        return add
