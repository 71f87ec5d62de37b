"""Recurrent layers, which Dynamo leaves to Python: their weights are quantized there, for torch's fused kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from fxquant.prepared.quantizer import Quantizer
from fxquant.prepared.weight_function import weight_function
from fxquant.spec.mode import Mode

Functions = MutableMapping[Any, Any]


@contextlib.contextmanager
def quantized_weights(layer: nn.RNNBase, quantizers: Iterable[Quantizer], functions: Functions) -> Iterator[None]:
    """Inside, a recurrent layer's kernel reads its weights as they are quantized.

    ``functions`` keeps what was made for a weight, for the next call. The list of weights is private; tried on 2.13.
    """
    held = layer._flat_weights
    by_name: dict[str, Any] = dict(zip(layer._flat_weights_names, held, strict=True))
    for quantizer in quantizers:
        mode = quantizer.mode(layer.training)
        for edge in () if mode is Mode.OFF or mode.calibrates else quantizer.site.edges:
            weight = by_name[edge.operand]
            by_name[edge.operand] = _function(quantizer, weight, mode, functions)(weight, *quantizer.state.values())
    layer.__dict__["_flat_weights"] = list(by_name.values())
    try:
        yield
    finally:
        layer.__dict__["_flat_weights"] = held


def _function(quantizer: Quantizer, weight: Tensor, mode: Mode, functions: Functions) -> Any:
    key = quantizer.spec, mode, weight.shape, weight.dtype, weight.device
    if key not in functions:
        functions[key] = weight_function(quantizer.spec, weight, list(quantizer.state.values()), mode)
    return functions[key]
