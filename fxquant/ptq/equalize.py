"""`equalize`: the weights of layers that follow each other, brought to one range channel by channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.ptq.report import PtqReport
from fxquant.ptq.rescale import rescale
from fxquant.ptq.rescaling import Region

_SWEEPS = 20
_ENOUGH = 0.01  # the largest step, as a factor's logarithm, after which nothing changes any more


def equalize(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> PtqReport:
    """Cross-layer equalization: scales channels between products of a prepared model so that both have one range.

    For each channel i of a tensor that one product makes and others read, with ``r₁ᵢ`` the largest magnitude of the
    weights that make it and ``r₂ᵢ`` of those that read it::

        sᵢ = √(r₁ᵢ / r₂ᵢ),    W₁ᵢ, b₁ᵢ ← W₁ᵢ / sᵢ, b₁ᵢ / sᵢ,    W₂ᵢ ← W₂ᵢ · sᵢ

    over all pairs until nothing changes. The model's function in float stays. Pairs are found in the captured graph:
    between the products lies only what commutes with a scale for each channel: ReLU, pools, what moves values,
    products with other activations, attention's values. Of a BatchNorm that is folded, γ and β are scaled.

    Args:
        data: batches as for `fxquant.calibrate`, kept in memory: they run to find the graph, to see how far the
            activations between have moved, and to measure.
        progress: draw bars on a terminal.

    Ranges that are set are moved along with their tensors. The report has the error of the products that read each
    tensor, before and after, and names what is left alone, with the reason. Weights, biases and ranges change; after
    an error all are as they were. Raises InvalidArgument for an unprepared model, no data, or no pair.

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction" (2019), section 4.1.
    """

    def choose(region: Region, _: Tensor) -> Tensor:
        return torch.sqrt(region.source_amax() / region.reader_amax())

    def wanted(region: Region) -> str | None:
        source = region.source.product
        if source is None:
            return "it is no product"
        if not source.is_quantized and not any(product.is_quantized for product, _ in region.readers):
            return "neither it nor what reads it is quantized"
        return None

    return rescale(model, data, "equalize", choose, wanted, sweeps=_SWEEPS, enough=_ENOUGH, progress=progress)
