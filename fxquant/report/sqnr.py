"""How much each quantizer distorts its tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxquant.prepared.root import require_plan
from fxquant.probe.recording import record
from fxquant.probe.visitor import Use


def sqnr(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Signal to quantization noise of every site on one batch, in dB: ``10 · log₁₀(Σ x² / Σ (q(x) − x)²)``.

    Site key → dB, in execution order, in float64; ``inf`` where nothing was lost. Each site is measured after
    the quantizers before it. Raises InvalidArgument for an unprepared model.
    """
    require_plan(model, "sqnr")
    ratios: dict[str, float] = {}

    def visit(key: str, use: Use) -> None:
        x, y = use.input.to(torch.float64), use.quantized.to(torch.float64)
        signal, noise = float(x.square().sum()), float((y - x).square().sum())
        ratios[key] = 10 * math.log10(signal / noise) if signal and noise else math.inf

    record(model, args, kwargs, visit)
    return ratios
