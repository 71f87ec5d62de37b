"""The weights that `mixed` chooses formats for: how each is measured alone, and which activations go with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from fxquant.ops import fake_quantize, qparams
from fxquant.plan.plan import Plan, Site
from fxquant.prepared.quantizer import quantizers
from fxquant.probe.visitor import Use, Visit
from fxquant.search.operator_runs import OperatorRun
from fxquant.search.sweep import only
from fxquant.spec.quant_spec import QuantSpec


@dataclass
class Weight:
    """A quantized weight; its sizes are known after the first run of it."""

    site: Site
    count: int = 0  # elements
    float_bytes: int = 0  # of one element

    def measure(self, x: Tensor) -> None:
        """Takes the sizes from the float tensor."""
        self.count, self.float_bytes = x.numel(), x.element_size()

    def bytes(self, spec: QuantSpec | None) -> int:
        """Bytes of its codes in a format, or of its floats."""
        return self.count * self.float_bytes if spec is None else -(-self.count * spec.bits // 8)


def switched_on_weights(model: nn.Module, plan: Plan) -> dict[str, Weight]:
    """Site key → weight, for those whose quantizers are on."""
    on = {key for key, quantizer in quantizers(model) if quantizer.is_on}
    return {site.key: Weight(site) for site in plan.sites if site.local.role == "weight" and site.key in on}


def alone_as(weight: Weight, spec: QuantSpec) -> Visit:
    """Quantizes only this weight, in another format, as `InsertFakeQuantize` computes it."""
    site = weight.site

    def visit(use: Use) -> Tensor:
        x = use.input
        if site.key not in use.keys:
            return x
        weight.measure(x)
        axis, rows = spec.axis, x
        if site.local.spec.group_size is not None and site.matrix is not None:  # x has a group in each row
            axis, rows = 0, x.reshape(-1, spec.group_size or site.matrix[1])
        scale, zero_point = qparams.SYMMETRIC_QPARAMS(rows, axis, spec.quant_max)
        limits = (spec.quant_min, spec.quant_max)
        if axis is None:
            y: Tensor = fake_quantize.PER_TENSOR(x, scale, zero_point, *limits, rounding=spec.rounding)
            return y
        y = fake_quantize.PER_CHANNEL(rows, scale, zero_point, axis, *limits, rounding=spec.rounding)
        return y.reshape(x.shape)

    return visit


def alone_with_activations(weight: Weight, readers: Readers) -> Visit:
    """Quantizes only this weight, and the activations that its operators alone read."""
    key = weight.site.key

    def visit(use: Use) -> Tensor | None:
        if key in use.keys:
            weight.measure(use.input)
        return only(readers.only_for({key}) | {key})(use)

    return visit


class Readers:
    """Which operators read through which sites, as far as batches have run."""

    def __init__(self, plan: Plan, operator_runs: list[OperatorRun] | None = None) -> None:
        self.activations = {site.key for site in plan.sites if site.local.role == "activation"}
        self.operator_runs = [] if operator_runs is None else operator_runs
        self._known = -1
        self._by_site: dict[str, set[frozenset[str]]] = {}

    def only_for(self, weights: Collection[str]) -> set[str]:
        """Activations every reader of which has one of these weights."""
        if self._known != len(self.operator_runs):
            self._known, self._by_site = len(self.operator_runs), {}
            for one in self.operator_runs:
                for key in one.keys & self.activations:
                    self._by_site.setdefault(key, set()).add(one.keys)
        return {key for key, those in self._by_site.items() if not any(keys.isdisjoint(weights) for keys in those)}
