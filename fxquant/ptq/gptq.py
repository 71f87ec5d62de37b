"""`gptq`: codes of weights chosen column by column, each making up for the error of those before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.ptq.choose_codes import Matrices, choose_codes
from fxquant.ptq.report import PtqReport

_AT_ONCE = 128  # columns whose updates of the rest are done together


def gptq(
    model: nn.Module,
    data: Iterable[Any],
    *,
    damping: float = 0.01,
    ordered: bool = True,
    clip: bool = False,
    progress: bool = True,
) -> PtqReport:
    """Chooses the codes of a prepared model's weights so that products, not weights, change least.

    Each weight becomes the values of its chosen codes, which its quantizer gives back from then on: in training, and
    in the file. Column by column of the matrix, in the order in which its inputs are large, weights are rounded to
    nearest, and the error is made up for by those that are still to come::

        wⱼ ← wⱼ − (wᵢ − qᵢ) · Uᵢⱼ / Uᵢᵢ    for j after i,  UᵀU = (H + λ·I)⁻¹,  H = Σ x xᵀ

    Scales stay those of the weights as they were: the element that a scale is taken from keeps the highest code. H is
    that of the quantized model's inputs, in one pass over the data; for K of them it takes ``12·K²`` bytes.

    Args:
        data: batches as for `fxquant.calibrate`.
        damping: λ is this share of the mean of H's diagonal.
        ordered: take columns in the order of H's diagonal, largest first; else as they stand.
        clip: take the scales that `fxquant.ptq.clip_weights` would, of the weights as they are: what is cut off is
            made up for too.
        progress: draw bars on a terminal.

    Weights of linears, matrix products and convolutions, of any width of integers, per tensor, channel or group; those
    that BatchNorm is folded into too. The report names what is left alone, with the reason: parameters that something
    else reads too, transposed convolutions, embeddings, weights that rounding to nearest is as good for. Only weights
    change, all at the end, and after an error all of them are as they were.

    Raises:
        InvalidArgument: an unprepared model, no data, no weight that it can use, or a damping that is not positive.

    Source: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers" (2022).
    """
    if not damping > 0:
        raise InvalidArgument(f"damping must be positive: got {damping}.")

    def choose(problem: Matrices) -> Tensor:
        each = zip(problem.weight, problem.moments, problem.scale, problem.fixed, strict=True)
        return torch.stack([gptq_codes(*one, problem.limits, damping=damping, ordered=ordered) for one in each])

    return choose_codes(model, data, "gptq", choose, clip=clip, progress=progress)


def gptq_codes(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    fixed: Tensor,
    limits: tuple[int, int],
    *,
    damping: float,
    ordered: bool,
) -> Tensor:
    """The codes of a matrix ``[N, K]`` with ``H [K, K]``, a scale for each element, and elements that keep their code.

    All in float64.
    """
    own = (weight / scale).round().clamp(*limits)
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if ordered else torch.arange(len(diagonal))
    w, scale, fixed, kept = (each[:, order].clone() for each in (weight, scale, fixed, own))
    upper = _inverse_factor(moments[order][:, order], damping)
    codes = torch.zeros_like(w)
    for start in range(0, w.shape[1], _AT_ONCE):
        end = min(start + _AT_ONCE, w.shape[1])
        errors = torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            nearest = (w[:, i] / scale[:, i]).round().clamp(*limits)
            codes[:, i] = torch.where(fixed[:, i], kept[:, i], nearest)
            error = (w[:, i] - codes[:, i] * scale[:, i]) / upper[i, i]
            w[:, i + 1 : end] -= error.unsqueeze(1) * upper[i, i + 1 : end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper triangular U with ``UᵀU = (H + λ·I)⁻¹``."""
    mean = moments.diagonal().mean()
    ridge = damping * mean if mean > 0 else moments.new_ones(())
    damped = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
