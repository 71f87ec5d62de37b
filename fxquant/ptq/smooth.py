"""`smooth`: outlier channels of activations moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.ptq.report import PtqReport
from fxquant.ptq.rescale import rescale
from fxquant.ptq.rescaling import Region


def smooth(model: nn.Module, data: Iterable[Any], alpha: float = 0.5, *, progress: bool = True) -> PtqReport:
    """SmoothQuant: scales the channels of a prepared model's activations, and undoes it in the weights that read them.

    For each channel j of an activation X that quantized products read::

        sⱼ = max |Xⱼ|^α / max |Wⱼ|^(1 − α),    X ← X / s,    Wⱼ ← Wⱼ · sⱼ

    X / s comes out of the parameters that make X: weight and bias of a norm, a parameter that it is multiplied by, or
    the weight and bias of a product. The model's function in float stays. All is found in the captured graph, not by
    module: between may lie what commutes with a scale for each channel, as for `fxquant.ptq.equalize`.

    Args:
        data: batches as for `fxquant.calibrate`, kept in memory: they run to find the graph, for max |Xⱼ|, and to
            measure.
        alpha: how much of a channel's size the weights take over, from 0 to 1.
        progress: draw bars on a terminal.

    Ranges that are set are moved along with their tensors. The report has the error of the products that read each
    activation, before and after, and names what is left alone, with the reason. Weights, biases and ranges change, and
    after an error all are as they were. Raises InvalidArgument for an unprepared model, no data, an alpha
    outside [0, 1], or no activation that it can use.

    Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language
    models" (2022).
    """
    if not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha must be from 0 to 1: got {alpha}.")

    def choose(region: Region, amax: Tensor) -> Tensor:
        found: Tensor = amax.pow(alpha) / region.reader_amax().pow(1 - alpha)
        return found

    def wanted(region: Region) -> str | None:
        if not region.sites:
            return "the activation that it makes is not quantized"
        if not any(product.is_quantized for product, _ in region.readers):
            return "no quantized weight reads it"
        return None

    return rescale(model, data, "smooth", choose, wanted, progress=progress)
