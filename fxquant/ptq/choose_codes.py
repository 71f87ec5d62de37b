"""Weights rounded to codes that a method chooses: what it is given, and how they get into the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.ptq.changes import Changes, undone_on_error
from fxquant.ptq.clip_weights import best_ends
from fxquant.ptq.moments import Moments, relative_error
from fxquant.ptq.products import Product, Products
from fxquant.ptq.report import PtqReport, PtqRow, require_some
from fxquant.ptq.running import opened
from fxquant.support.progress import track

_MEASURE = "error of the product's result, ‖(W − Q)·x‖ / ‖W·x‖"


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """A weight to round, as matrices ``[groups, N, K]`` in float64.

    Attributes:
        weight: in float.
        nearest: what its quantizer makes of it.
        scale: of each element's code.
        fixed: elements that keep the code that is nearest.
        limits: the lowest and the highest code.
        moments: H, ``[groups, K, K]``.
    """

    weight: Tensor
    nearest: Tensor
    scale: Tensor
    fixed: Tensor
    limits: tuple[int, int]
    moments: Tensor

    @classmethod
    def of(cls, product: Product, moments: Tensor, clip: bool) -> Matrices:
        """Of a product; ``clip``: with the scale of the least squared error of the weight instead of its own."""
        path, float_weight = product.weight, product.weight.read()
        scale, numbers = path.scale, path.numbers
        nearest = path.codes().double() * scale.double()[numbers]
        if clip and path.is_scaled_by_itself:
            ends, _, _ = best_ends(
                float_weight.reshape(-1), numbers.reshape(-1), path.grid.quant_min, path.grid.quant_max
            )
            scale = torch.where(ends > 0, ends.to(scale.dtype) / path.grid.quant_max, scale)
        return cls(
            weight=product.matrix(float_weight).double(),
            nearest=product.matrix(nearest),
            scale=product.matrix(scale[numbers]).double(),
            fixed=fixed_elements(product),
            limits=path.limits,
            moments=moments,
        )

    def error(self, rounded: Tensor) -> float:
        """``‖(W − Q)·x‖ / ‖W·x‖`` over all vectors."""
        return relative_error(self.weight - rounded, self.weight, self.moments)


Rounding = Callable[[Matrices], Tensor]  # the chosen codes, ``[groups, N, K]``


def choose_codes(
    model: nn.Module, data: Iterable[Any], caller: str, choose: Rounding, *, clip: bool, progress: bool
) -> PtqReport:
    """Writes the codes that ``choose`` gives for each weight of a model into it, as the values that they stand for.

    A weight whose quantizer would then give other codes is left as it was, and declined.
    """
    with opened(model, caller) as running, undone_on_error() as changes:
        moments = Moments()

        def visit(batch: Any) -> None:
            running.run(batch, moments.watch, quantized=True)

        running.over(data, visit, f"{caller}: inputs", progress)
        products, rows = Products(running.graphs), []
        declined = {**products.declined}
        for product in products:
            if product.is_quantized and (why := _why_not(product, products, moments)):
                declined[product.key] = why
        wanted = [key for key in moments.sums if key not in declined]
        require_some(caller, wanted, "integer weights of products", declined.items())
        for key in track(wanted, f"{caller}: weights", show=progress):
            row = _round(products.all[key], moments.sums[key], changes, choose, clip)
            if isinstance(row, PtqRow):
                rows.append(row)
            else:
                declined[key] = row
    return PtqReport(method=caller, measure=_MEASURE, rows=tuple(rows), declined=tuple(declined.items()))


def _why_not(product: Product, products: Products, moments: Moments) -> str | None:
    """Why the codes of a weight cannot be chosen; None if they can."""
    why = product.why_no_codes() or product.why_no_matrix()
    other = products.other_reader(product.weight.tensor, product.key)
    if why is None and other is not None:
        why = f"{other} reads the same parameter"
    if why is None and not bool(product.weight.read().isfinite().all()):
        why = "its weight is not finite"
    if why is None and not bool(moments.sums[product.key].isfinite().all()):
        why = "its input was not finite"
    return why


def _round(product: Product, moments: Tensor, changes: Changes, choose: Rounding, clip: bool) -> PtqRow | str:
    path, problem = product.weight, Matrices.of(product, moments, clip)
    before = problem.error(problem.nearest)
    codes = choose(problem)
    rounded = codes * problem.scale
    after = problem.error(rounded)
    if after >= before:
        return f"rounding to nearest is as good: {before:.4g}"
    was, nearest = path.tensor.detach().clone(), product.matrix(path.codes())
    changes.put(path.tensor, path.written(product.operand(rounded)))
    if not torch.equal(product.matrix(path.codes()).double(), codes):
        changes.put(path.tensor, was)
        return f"{path.tensor.dtype} does not hold its codes times their scales closely enough"
    note = f"{int((codes != nearest).sum())} of {codes.numel()} codes"
    return PtqRow(key=product.key, before=before, after=after, note=note)


def fixed_elements(product: Product) -> Tensor:
    """Of each scale that is taken from the weight, the element of the largest magnitude, as a matrix of bools.

    Its code is the highest one and has to stay so: it is what the scale is computed from.
    """
    operand, weight = product.weight.read(), product.weight
    fixed = torch.zeros(operand.numel(), dtype=torch.bool, device=operand.device)
    if weight.is_scaled_by_itself:
        numbers, sizes = weight.numbers.reshape(-1), operand.abs().reshape(-1)
        order = sizes.sort(descending=True, stable=True).indices
        count = int(numbers.max()) + 1
        first = torch.full((count,), sizes.numel(), device=sizes.device)
        places = torch.arange(sizes.numel(), device=sizes.device)
        first = first.scatter_reduce(0, numbers[order], places, "amin")
        fixed[order[first[first < sizes.numel()]]] = True
    return product.matrix(fixed.view(operand.shape))
