"""`Quantizer`: the state of one site, a module on the site's owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxquant.capture.sharded import SHARDED
from fxquant.errors import UnsupportedModel
from fxquant.graph.frames import without_wrappers
from fxquant.plan.plan import LocalSite
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges.base import Range

ATTRIBUTE = "quantizers"
Doing = Literal["float", "observe", "quantize"]
"""What a site does in a stage of a `fxquant.Schedule`."""


class Quantizer(nn.Module):
    """State of one site: what its range keeps between steps, as buffers and parameters, if it keeps anything.

    The tensors keep their dtype under ``.half()``. Keys that a float checkpoint lacks are no error.

    Attributes:
        observing: in training, the range follows the data; else it stays.
        enabled: the tensor is quantized at all.
        doing: what the stage of a schedule has it do: leave the tensor float, observe it in training, or quantize it.
        resolved: the range is known to be set, so that graphs need not look at it.
        names: of what is kept.
        calibrating: the observing mode of a calibration in progress, None outside one.
    """

    min_val: Tensor  # of those whose range is a `fxquant.MovingAverage`
    max_val: Tensor
    doing: Doing = "quantize"  # of the class, too: older pickles lack it

    def __init__(self, site: LocalSite, scales: int = 1) -> None:
        super().__init__()
        self.site = site
        self.names = site.spec.range.names(site.spec)
        self.observing = True
        self.enabled = True
        self.resolved = False
        self.calibrating: Mode | None = None
        state = self.range.initial_state(self.spec, scales)
        assert tuple(state) == self.names, "a range's initial state has the names that it says"
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.site.spec

    @property
    def range(self) -> Range:
        """How the scale is found."""
        return self.site.spec.range

    @property
    def is_on(self) -> bool:
        """Whether the tensor is quantized now."""
        return self.enabled and self.doing == "quantize"

    @property
    def stateful(self) -> bool:
        """Whether something is kept between steps."""
        return self.site.spec.range.stateful

    @property
    def state(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def evidence(self) -> Tensor | None:
        """The first tensor of the state: an input of every graph that binds the site, by which it is known there."""
        return next(iter(self.state.values()), None)

    def mode(self, training: bool) -> Mode:
        """What the site does in a graph traced now."""
        if not self.enabled:
            return Mode.OFF
        if self.calibrating is not None:
            return self.calibrating if self.stateful else Mode.OFF
        if self.doing == "quantize":
            return self.site.spec.range.mode(training and self.observing, self.resolved)
        observes = self.doing == "observe" and training and self.observing and self.stateful
        return Mode.OBSERVE if observes else Mode.OFF

    def let_move(self, on: bool) -> None:
        """Whether the range moves in training: with the data, or, of parameters, by their gradients."""
        self.observing = on
        for value in self.parameters():
            value.requires_grad_(on)

    def is_set(self) -> bool:
        """Looks (on the host) whether there is a range to quantize with."""
        return not self.stateful or self.range.is_set(self.state)

    def settle(self, *, but_for_zeros: bool = False) -> bool:
        """Looks whether the range is set, ``but_for_zeros`` by more than zeros; remembers it if so."""
        self.resolved = self.is_set() and not (but_for_zeros and self.range.is_degenerate(self.state))
        return self.resolved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = {name: value.data if isinstance(value, nn.Parameter) else value for name, value in self.state.items()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype == before.dtype:
                continue
            # A range rounded to half precision would move every code.
            if isinstance(now, nn.Parameter):
                now.data = before.to(now.device)
            else:
                self._buffers[name] = before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        local_metadata, strict, missing, unexpected, errors = args
        names = tuple(name for name in self.names if prefix + name in state_dict)
        if names == self.names:
            given: dict[str, Tensor] = {name: state_dict[prefix + name] for name in names}
            with torch.no_grad():
                for name, value in self.range.as_written_today(given, self.spec).items():
                    state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for name in self.names:
            if prefix + name in missing:
                missing.remove(prefix + name)
        self.settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.names = self.range.names(self.spec)
        kept = {name: value.data for name, value in self.state.items()}
        for name, value in self.range.as_written_today(kept, self.spec).items():
            kept[name].copy_(value)

    @property
    def is_leaf(self) -> bool:
        """Raises UnsupportedModel: what takes a layer's quantizer of this name for its tensor is parallelize_module."""
        raise UnsupportedModel(SHARDED)

    def extra_repr(self) -> str:
        """``u8, [-0.42, 3.1]``."""
        return f"{self.spec}, {self.range.describe(self.state)}" if self.stateful else str(self.spec)


class QuantizerSet(nn.ModuleDict):
    """The quantizers of one owner, by site name."""

    def __init__(self, sites: Iterable[tuple[LocalSite, int]]) -> None:
        super().__init__({site.name: Quantizer(site, scales) for site, scales in sites})

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
            assert isinstance(quantizer, Quantizer)
            yield f"{path}.{name}" if path else name, quantizer


def planned_quantizers(model: nn.Module) -> dict[str, tuple[str, Quantizer]]:
    """Site key, as it was before torch's wrappers came around modules → owner's path now, and quantizer."""
    return {
        without_wrappers(f"{path}.{name}"): (path, quantizer)
        for path, _, found in owners(model)
        for name, quantizer in found.items()
        if isinstance(quantizer, Quantizer)
    }
