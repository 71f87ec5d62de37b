"""`Quantizer`: the state of one site, a module on the site's owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.plan.plan import LocalSite
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import MovingAverage

if TYPE_CHECKING:
    pass


ATTRIBUTE = "quantizers"


class Quantizer(nn.Module):
    """State of one site: ``min_val`` and ``max_val`` (float32, one element, NaN until data was seen) if it has any.

    The tensors stay float32 under ``.half()``. Keys that a float checkpoint lacks are no error.

    Attributes:
        observing: in training, the range follows the data; else it stays.
        enabled: the tensor is quantized at all.
        resolved: the range is known to be set, so that graphs need not look at it.
        calibrating: the observing mode of a calibration in progress, None outside one.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, site: LocalSite) -> None:
        super().__init__()
        self.site = site
        self.observing = True
        self.enabled = True
        self.resolved = False
        self.calibrating: Mode | None = None
        if self.stateful:
            self.register_buffer("min_val", torch.full((1,), float("nan")))
            self.register_buffer("max_val", torch.full((1,), float("nan")))

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.site.spec

    @property
    def stateful(self) -> bool:
        """Whether the range is kept between steps."""
        return self.site.spec.range.stateful

    @property
    def delayed(self) -> bool:
        """Whether training quantizes with the range before its update."""
        found = self.site.spec.range
        return isinstance(found, MovingAverage) and found.delayed

    def mode(self, training: bool) -> Mode:
        """What the site does in a graph traced now."""
        if not self.enabled:
            return Mode.OFF
        if self.calibrating is not None:
            return self.calibrating if self.stateful else Mode.OFF
        if not self.stateful:
            return Mode.STATIC
        if training and self.observing:
            if not self.delayed:
                return Mode.TRAIN
            return Mode.DELAYED if self.resolved else Mode.FIRST
        return Mode.STATIC if self.resolved else Mode.RESOLVE

    def settle(self) -> bool:
        """Looks (on the host) whether the range is set; remembers it if so."""
        self.resolved = not self.stateful or bool(torch.isfinite(self.min_val) & torch.isfinite(self.max_val))
        return self.resolved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                # A range rounded to half precision would move every code.
                self._buffers[name] = before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        local_metadata, strict, missing, unexpected, errors = args
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for name in self._buffers:
            if prefix + name in missing:
                missing.remove(prefix + name)
        self.settle()

    def extra_repr(self) -> str:
        """``u8, [-0.42, 3.1]``."""
        if not self.stateful:
            return str(self.spec)
        return f"{self.spec}, [{self.min_val.item():.4g}, {self.max_val.item():.4g}]"


class QuantizerSet(nn.ModuleDict):
    """The quantizers of one owner, by site name."""

    def __init__(self, sites: tuple[LocalSite, ...]) -> None:
        super().__init__({site.name: Quantizer(site) for site in sites})

    def forward(self, value: Any = None, *_: Any, **__: Any) -> Any:
        """The identity: an owner that runs all its children, as nn.Sequential does, runs its quantizers too."""
        return value


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizerSet]]:
    """Every module that owns quantizers, with its path."""
    for path, module in model.named_modules():
        found = module._modules.get(ATTRIBUTE)
        if isinstance(found, QuantizerSet):
            yield path, module, found


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Site key → quantizer, in module order."""
    for path, _, found in owners(model):
        for name, quantizer in found.items():
            yield f"{path}.{name}" if path else name, quantizer  # type: ignore[misc]
