"""How much each quantizer distorts its tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.plan.plan import Role
from fxquant.prepared.root import require_plan
from fxquant.probe.recording import record


def sqnr(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Signal to quantization noise of every site on one batch, in dB: ``10 · log₁₀(Σ x² / Σ (q(x) − x)²)``.

    Site key → dB, in execution order, in float64; ``inf`` where nothing was lost. Each site is measured behind
    the quantizers before it. Raises InvalidArgument for an unprepared model.
    """
    require_plan(model, "sqnr")
    found: dict[str, float] = {}

    def visit(key: str, role: Role, x: Tensor, scale: Tensor, zero_point: Tensor, y: Tensor) -> None:
        signal = float(x.to(torch.float64).square().sum())
        noise = float((y.to(torch.float64) - x.to(torch.float64)).square().sum())
        found[key] = 10 * math.log10(signal / noise) if signal and noise else math.inf

    record(model, args, kwargs, visit)
    return found
