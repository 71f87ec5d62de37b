"""The loss that keeps weights from oscillating between two codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.graph.frames import without_wrappers
from fxquant.plan.plan import LocalSite, Site
from fxquant.prepared.quantizer import Quantizer, planned_quantizers
from fxquant.prepared.weight_function import weight_function
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec

_PARAMETERS = ("weight", "in_proj_weight")  # of torch's modules that run one operator with a weight
_Quantize = Callable[..., Tensor]


def check_damped(model: nn.Module, sites: Iterable[Site], where: str) -> None:
    """Raises InvalidArgument for a weight whose parameter is not known."""
    unknown = [site.key for site in sites if weight_of(model, site.owner, site.local) is None]
    if unknown:
        raise InvalidArgument(
            f"{where}.damping must be said of weights that are their module's own `weight`: got {len(unknown)} that "
            f"are not ({', '.join(unknown[:6])}). Name others by sites=…"
        )


def weight_of(model: nn.Module, owner: str, site: LocalSite) -> Tensor | None:
    """The weight that a site quantizes, where it is its module's own."""
    path = ".".join(filter(None, (owner, site.edges[0].path)))
    module = model.get_submodule(path)
    found = (getattr(module, name, None) for name in (site.edges[0].operand, *_PARAMETERS))
    return next((value for value in found if isinstance(value, Tensor)), None)


class Damping:
    """``Σ factor · (Q(w) − clip(w))²`` over the weights of a prepared model that are quantized now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: dict[tuple[str, QuantSpec], _Quantize] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphs": {}}  # made anew, as pickle has no place for their operators

    def loss(self, factors: Mapping[str, float]) -> Tensor:
        """The loss, in float32; ``factors`` by the plan's keys."""
        held = planned_quantizers(self.model) if any(factors.values()) else {}
        total: Tensor | None = None
        seen: set[tuple[int, QuantSpec]] = set()
        for key, factor in factors.items():
            if not factor:
                continue
            path, quantizer = held[without_wrappers(key)]
            weight = weight_of(self.model, path, quantizer.site)
            if weight is None or not weight.requires_grad or (id(weight), quantizer.spec) in seen:
                continue
            if quantizer.mode(True) is Mode.OFF or quantizer.mode(True).calibrates:
                continue
            seen.add((id(weight), quantizer.spec))
            term = factor * self._distance(key, quantizer, weight)
            total = term if total is None else total + term.to(total.device)
        if total is None:
            return torch.zeros((), device=next(self.model.parameters(), torch.empty(0)).device)
        return total

    def _distance(self, key: str, quantizer: Quantizer, weight: Tensor) -> Tensor:
        """``Σ (Q(w) − w)²`` over the elements within the range of the codes: those that a gradient passes through."""
        state = [value.detach() for value in quantizer.state.values()]
        name = key, quantizer.spec
        if name not in self._graphs:
            self._graphs[name] = weight_function(quantizer.spec, weight, state, Mode.STATIC)
        with torch.enable_grad():
            given = weight.detach().requires_grad_()
            quantized = self._graphs[name](given, *state)
            (inside,) = torch.autograd.grad(quantized, given, torch.ones_like(quantized))
        apart = (weight - quantized.detach()) * (inside != 0)
        return apart.float().square().sum()
