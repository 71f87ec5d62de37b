"""`Stage`: what changes in a quantized training at some step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fxquant.errors import InvalidArgument

What = Literal["float", "observe", "quantize"] | int
_NAMED = ("float", "observe", "quantize")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is otherwise from a step on; what is left out stays as it was in the stage before.

    Attributes:
        at: how many steps are done before it: a whole number, or a float from 0.0 to 1.0, that share of all steps.
        weights: what weights are: ``"float"``; ``"observe"``, float while ranges that learn look at them;
            ``"quantize"``, as the plan says; or a number of bits, of integers whose plan has fewer.
        activations: the same of all other sites. ``"observe"`` leaves them float, and their ranges follow the data.
        sites: glob over the site keys that `fxquant.explain` shows, of which ``weights``, ``activations`` and
            ``damping`` are said.
        freeze_ranges: whether ranges are held, as by `fxquant.freeze_ranges`.
        freeze_batch_norm: whether BatchNorm statistics are held, as by `fxquant.freeze_batch_norm`.
        damping: factor of `Schedule.damping`, which pulls weights towards the values that they are quantized to.
        batch_norm_data: batches that `fxquant.reestimate_batch_norm` is given as the stage begins.
    """

    at: int | float
    weights: What | None = None
    activations: What | None = None
    sites: str = "*"
    freeze_ranges: bool | None = None
    freeze_batch_norm: bool | None = None
    damping: float | None = None
    batch_norm_data: Iterable[Any] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_at(self.at)
        for name in ("weights", "activations"):
            _check_what(name, getattr(self, name))
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping >= 0):
            raise InvalidArgument(f"Stage.damping must be a finite number of at least 0: got {self.damping!r}.")
        if not self.changes():
            raise InvalidArgument(f"Stage must say what changes: got none of {', '.join(_CHANGES)} (at={self.at!r}).")

    def changes(self) -> dict[str, Any]:
        """What it says, by field: plain values, of data only that there is some."""
        found = {name: getattr(self, name) for name in _CHANGES}
        found["batch_norm_data"] = None if self.batch_norm_data is None else True
        said = {name: value for name, value in found.items() if value is not None}
        if self.sites != "*" and said.keys() & {"weights", "activations", "damping"}:
            said["sites"] = self.sites
        return said

    def begins(self, total: int | None, where: str) -> int:
        """How many steps are done before it, of ``total`` altogether."""
        if isinstance(self.at, int):
            return self.at
        if total is None:
            raise InvalidArgument(
                f"total_steps must be given where a stage begins at a share of them: got None ({where}.at={self.at}). "
                "Write Schedule(model, stages, total_steps=…), or the step itself as a whole number."
            )
        return round(self.at * total)

    def __str__(self) -> str:
        """``weights 8 bits, activations observe``."""
        return ", ".join(_words(name, value) for name, value in self.changes().items())


_CHANGES = ("weights", "activations", "freeze_ranges", "freeze_batch_norm", "damping", "batch_norm_data")


def _check_at(at: Any) -> None:
    whole = isinstance(at, int) and not isinstance(at, bool) and at >= 0
    if not whole and not (isinstance(at, float) and 0.0 <= at <= 1.0):
        raise InvalidArgument(
            f"Stage.at must be a number of steps, or a share of them from 0.0 to 1.0: got {at!r}. "
            "Write whole steps without a point."
        )


def _check_what(name: str, what: Any) -> None:
    bits = isinstance(what, int) and not isinstance(what, bool) and 2 <= what <= 16
    if what is not None and what not in _NAMED and not bits:
        raise InvalidArgument(
            f"Stage.{name} must be {', '.join(map(repr, _NAMED))} or a number of bits from 2 to 16: got {what!r}."
        )


def _words(name: str, value: Any) -> str:
    if name in ("weights", "activations"):
        return f"{name} {value} bits" if isinstance(value, int) else f"{name} {value}"
    if name == "batch_norm_data":
        return "BatchNorm re-estimated"
    if name == "damping":
        return f"damping {value:g}"
    if name == "sites":
        return f"of {value}"
    return f"{'' if value else 'un'}{name.replace('_', ' ').replace('batch norm', 'BatchNorm')}"
