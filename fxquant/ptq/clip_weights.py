"""`clip_weights`: the few largest weights cut off where that makes all the others more exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.ptq.changes import undone_on_error
from fxquant.ptq.products import Product, Products
from fxquant.ptq.report import PtqReport, PtqRow, require_some
from fxquant.ptq.running import opened
from fxquant.support.progress import track

_SHARES = 100  # ends that are tried: k/100 of the largest magnitude
_LEAST = 20  # the smallest k


def clip_weights(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> PtqReport:
    """Clamps the weights of a prepared model to ±c, for each scale the c of the least squared error of its weights.

    A weight's scale is taken from its largest magnitude, so that a weight clamped to ±c has the range c: ``c`` is the
    one of 0.20, 0.21 … 1.00 of the largest magnitude with the least ``Σ (w − Q(clamp(w, −c, c)))²``. It mostly helps
    formats of few bits.

    Args:
        data: batches as for `fxquant.calibrate`, run to see which weight is read how; one is enough where it runs all
            layers.
        progress: draw bars on a terminal.

    Weights of linears, products and convolutions in integers whose scale is their own. Only weights change, all at the
    end, and after an error all of them are as they were. Raises InvalidArgument for an unprepared model, no data, or
    no weight that it can use.
    """
    with opened(model, "clip_weights") as running, undone_on_error() as changes:
        running.over(
            data, lambda batch: running.run(batch, lambda graph: {}, quantized=True), "clip_weights: graph", progress
        )
        products = Products(running.graphs)
        declined = dict(products.declined)
        refused = {product: _why_not(product, products) for product in products if product.is_quantized}
        declined |= {product.key: why for product, why in refused.items() if why is not None}
        usable = [product for product, why in refused.items() if why is None]
        require_some("clip_weights", usable, "integer weights of products", declined.items())
        rows = []
        for product in track(usable, "clip_weights: weights", show=progress):
            clipped = _clipped(product)
            if isinstance(clipped, str):
                declined[product.key] = clipped
                continue
            changes.put(product.weight.tensor, product.weight.written(clipped[0]))
            rows.append(clipped[1])
    measure = "error of the weight, ‖W − Q‖ / ‖W‖"
    return PtqReport(method="clip_weights", measure=measure, rows=tuple(rows), declined=tuple(declined.items()))


def _why_not(product: Product, products: Products) -> str | None:
    """Why a product's weight cannot be clamped; None if it can."""
    weight, why = product.weight, product.why_no_codes()
    if why is not None:
        return why
    if not weight.is_scaled_by_itself:
        return "its scale is not taken from the weight"
    other = products.other_reader(weight.tensor, product.key)
    if other is not None:
        return f"{other} reads the same parameter"
    return None if bool(weight.read().isfinite().all()) else "its weight is not finite"


def _clipped(product: Product) -> tuple[Tensor, PtqRow] | str:
    """The clamped weight, or why it stays."""
    weight = product.weight
    w, numbers, grid = weight.read(), weight.numbers, weight.grid
    ends, before, after = best_ends(w.reshape(-1), numbers.reshape(-1), grid.quant_min, grid.quant_max)
    if not after < before:
        return "its whole range has the least error"
    size = float(w.double().square().sum())
    end = ends[numbers]
    count = int((w.abs() > end).sum())
    note = f"{count} of {w.numel()} weights clamped"
    row = PtqRow(key=product.key, before=(before / size) ** 0.5, after=(after / size) ** 0.5, note=note)
    return w.clamp(-end, end), row


def best_ends(w: Tensor, numbers: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, float, float]:
    """The end of each scale's range, shaped like the scales; the squared error with the whole ranges, and with these.

    ``numbers``: which scale each element has. Of equal ends the largest is taken.
    """
    count = int(numbers.max()) + 1
    whole = torch.zeros(count, dtype=w.dtype, device=w.device).scatter_reduce(0, numbers, w.abs(), "amax")
    best = torch.full((count,), torch.inf, dtype=torch.float64, device=w.device)
    ends, first = whole.clone(), best
    for share in range(_SHARES, _LEAST - 1, -1):
        end = whole * (share / _SHARES)
        scale = (end.double() / quant_max)[numbers]
        code = (w.double() / scale).nan_to_num().round().clamp(max(quant_min, -quant_max), quant_max)
        error = torch.zeros_like(best).index_add(0, numbers, (w - code * scale).square())
        first = error if share == _SHARES else first
        ends, best = torch.where(error < best, end, ends), torch.minimum(error, best)
    return ends, float(first.sum()), float(best.sum())
