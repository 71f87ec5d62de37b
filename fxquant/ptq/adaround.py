"""`adaround`: whether each weight is rounded up or down, learned from what the product loses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.ptq.choose_codes import Matrices, choose_codes
from fxquant.ptq.report import PtqReport

_STRETCH = (-0.1, 1.1)  # ends of the sigmoid, beyond what it is clipped to: γ and ζ
_SHARPNESS = (20.0, 2.0)  # β as it starts and ends
_WARM = 0.2  # share of the steps in which nothing pulls weights to either side
_RATE, _MOMENTUM = 0.01, (0.9, 0.999)  # of Adam


def adaround(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 500,
    strength: float = 10.0,
    clip: bool = False,
    progress: bool = True,
) -> PtqReport:
    """Learns for each weight of a prepared model whether it is rounded up or down, so that products change least.

    Each weight becomes the values of its chosen codes, which its quantizer gives back from then on: in training, and
    in the file. For each row w of a matrix, of K weights and scale s, with ``H = Σ x xᵀ`` of the quantized model's
    inputs, Adam minimizes ::

        K · (w − q) H (w − q)ᵀ / (e H eᵀ) + strength · Σ (1 − |2·h(v) − 1|^β),   q = s · (⌊w/s⌋ + h(v))

    over v, where h is a sigmoid stretched to (−0.1, 1.1) and clipped to [0, 1], e the error of rounding to nearest, and
    β falls from 20 to 2; then each h is rounded. Rows for which rounding to nearest is as good are rounded so. H
    holds all that this depends on, so that one pass over the data is enough.

    Args:
        data: batches as for `fxquant.calibrate`.
        steps: of Adam, for each weight.
        strength: how much weights are pulled to either side.
        clip: take the scales that `fxquant.ptq.clip_weights` would, of the weights as they are.
        progress: draw bars on a terminal.

    Which weights, what is left alone and what an error leaves: as for `fxquant.ptq.gptq`, which also moves weights by
    more than one code, and takes less time.

    Raises:
        InvalidArgument: an unprepared model, no data, no weight that it can use, no step, or a negative strength.

    Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization" (2020).
    """
    if steps < 1 or not strength >= 0:
        raise InvalidArgument(f"steps must be at least 1 and strength at least 0: got {steps} and {strength}.")

    def choose(problem: Matrices) -> Tensor:
        return adaround_codes(
            problem.weight,
            problem.moments,
            problem.scale,
            problem.fixed,
            problem.limits,
            steps=steps,
            strength=strength,
        )

    return choose_codes(model, data, "adaround", choose, clip=clip, progress=progress)


def adaround_codes(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    fixed: Tensor,
    limits: tuple[int, int],
    *,
    steps: int,
    strength: float,
) -> Tensor:
    """The codes of matrices ``[groups, N, K]`` with ``H [groups, K, K]``, a scale for each element.

    ``fixed`` elements are rounded to nearest. In float64.
    """
    exact = (weight / scale).clamp(*limits)
    nearest = exact.round()
    down = exact.floor().clamp(max=limits[1] - 1)
    errors = _row_errors(weight - nearest * scale, moments)
    # Rows are problems of their own: each counts as if rounding to nearest were off by one code's square a weight.
    importance = torch.where(errors > 0, (weight.shape[-1] / errors).sqrt(), 0.0).unsqueeze(-1)
    given = torch.where(fixed, nearest - down, -1.0)
    problem = (exact - down, weight / scale - down, scale * importance, moments, given)
    up = _learned(*(each.float() for each in problem), steps=steps, strength=strength)
    codes = torch.where(fixed, nearest, down + up)
    better = _row_errors(weight - codes * scale, moments) < errors
    return torch.where(better.unsqueeze(-1), codes, nearest)


def _row_errors(difference: Tensor, moments: Tensor) -> Tensor:
    return (difference @ moments * difference).sum(-1)


def _learned(
    share: Tensor, wanted: Tensor, unit: Tensor, moments: Tensor, given: Tensor, *, steps: int, strength: float
) -> Tensor:
    """1 for each weight that is rounded up: Adam on v in float32, begun at the ``share`` of a code that is cut off.

    ``unit · (wanted − h)`` is what the product is off by; ``given`` is h where that is known, and not negative.
    """
    low, high = _STRETCH
    v = torch.logit((share - low) / (high - low))
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    known = given >= 0

    def soft() -> tuple[Tensor, Tensor]:
        """h, and its slope."""
        sigmoid = v.sigmoid()
        stretched = sigmoid * (high - low) + low
        inside = (stretched > 0) & (stretched < 1) & ~known
        slope = torch.where(inside, sigmoid * (1 - sigmoid) * (high - low), 0.0)
        return torch.where(known, given, stretched.clamp(0, 1)), slope

    for step in range(steps):
        up, slope = soft()
        gradient = -2 * unit * (((wanted - up) * unit) @ moments)
        progress = (step / steps - _WARM) / (1 - _WARM)
        if progress >= 0:
            sharpness = _SHARPNESS[1] + (_SHARPNESS[0] - _SHARPNESS[1]) * (1 - progress)
            side = 2 * up - 1
            gradient -= 2 * strength * sharpness * side.sign() * side.abs().pow(sharpness - 1)
        gradient *= slope
        first.lerp_(gradient, 1 - _MOMENTUM[0])
        second.lerp_(gradient.square(), 1 - _MOMENTUM[1])
        spread = (second / (1 - _MOMENTUM[1] ** (step + 1))).sqrt_().add_(1e-8)
        v -= _RATE / (1 - _MOMENTUM[0] ** (step + 1)) * first / spread
    return (soft()[0] >= 0.5).double()
