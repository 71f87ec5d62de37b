"""`Learned`: a range that is trained with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx, nn

from fxquant.errors import InvalidArgument
from fxquant.numerics import learned
from fxquant.numerics.learned import Grid, How, Init, Method
from fxquant.ops.learnable import lsq_grad_factor
from fxquant.ops.learned import LEARNED_SCALE, LEARNED_START, LEARNED_ZERO_POINT
from fxquant.ops.marks import STAND_IN
from fxquant.ops.qparams import ACTIVATION_SCALE_FLOOR, WEIGHT_SCALE_FLOOR
from fxquant.spec.mode import Mode
from fxquant.spec.ranges.base import UNSET, Range
from fxquant.spec.ranges.site_graph import Format, Qparams, SiteGraph

aten = torch.ops.aten

_PARAMETER = {"lsq": "scale", "lsq_plus": "scale", "pact": "alpha", "tqt": "log2_threshold", "amax": "amax"}
_WITH_FACTOR = ("lsq", "lsq_plus")  # whose papers scale the gradient


@dataclass(frozen=True, kw_only=True)
class Learned(Range):
    """A range that is trained: a parameter of the model for each scale, for weights and activations alike.

    ``"lsq"`` trains the scale (Esser et al., 2020), ``"lsq_plus"`` the scale and an offset, which gives the zero point
    (Bhalgat et al., 2020), ``"pact"`` the value that is clipped at, by what was clipped (Choi et al., 2018), ``"tqt"``
    the logarithm of that value, for scales that are powers of two (Jain et al., 2020), ``"amax"`` the greatest
    magnitude. Equations and when to use which: docs/ranges.md. Where a format has a zero point and the method does not
    train it, it stays what the parameter started with. Scales are positive whatever an optimizer does.

    A parameter starts with the range of least squared error: of the calibration data, else of the first batch; of a
    weight, the weight itself then. `fxquant.parameter_groups` gives an optimizer its own rate for them.

    Args:
        method: as above.
        init: ``"mse"``, or ``"max"`` to start with the extremes.
        gradient_scale: factor of the parameter's gradient; None for the paper's: ``1 / sqrt(N · quant_max)`` of
            "lsq" and "lsq_plus", with N the number of elements that share the scale (of an activation, in one sample),
            and 1 of the others.

    InvalidArgument for another method, init or factor, and for "lsq_plus" in a symmetric format.
    """

    kind: ClassVar[str] = "learned"
    roles: ClassVar[frozenset[str]] = frozenset({"weight", "activation", "output"})
    per_group: ClassVar[bool] = True
    takes_ends: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    method: Method = "lsq"
    init: Init = "mse"
    gradient_scale: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", get_args(Method)), ("init", get_args(Init))):
            if getattr(self, name) not in known:
                words = ", ".join(map(repr, known))
                raise InvalidArgument(f"Learned.{name} must be one of {words}: got {getattr(self, name)!r}.")
        factor = self.gradient_scale
        if factor is not None and not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
            raise InvalidArgument(
                f"Learned.gradient_scale must be a positive number, or None for the paper's: got {factor!r}. "
                "Use fxquant.freeze_ranges to train no scale."
            )

    @property
    def stateful(self) -> bool:
        """True."""
        return True

    def names(self, format: Format) -> tuple[str, ...]:
        """The parameter, and what gives the zero point where the format does not fix it."""
        parameter = _PARAMETER[self.method]
        if format.symmetric:
            return (parameter,)
        return (parameter, "offset" if self.method == "lsq_plus" else "zero_point")

    def check(self, format: Format) -> None:
        """Refuses "lsq_plus" where the zero point is fixed, and "pact" of small floats."""
        if self.method == "lsq_plus" and format.symmetric:
            raise InvalidArgument(
                "Learned(method='lsq_plus') must go with a format whose zero point is free: got a symmetric one, as "
                "weights have, and activations of some targets. Use method='lsq' there."
            )
        if self.method == "pact" and getattr(format, "element", None) is not None:
            raise InvalidArgument(
                f"Learned(method='pact') must go with integers: got codes of {format}. Use method='lsq' or 'amax'."
            )

    def initial_state(self, format: Format, scales: int = 1) -> dict[str, Tensor]:
        """Unset: parameters, and the zero point as a buffer."""
        state = super().initial_state(format, scales)
        return {n: value if n == "zero_point" else nn.Parameter(value) for n, value in state.items()}

    def converted(self, state: Mapping[str, Tensor], before: Format, now: Format) -> Mapping[str, Tensor] | None:
        """The same range in other codes."""
        if tuple(state) != self.names(now) or not self.is_set(state) or before.symmetric != now.symmetric:
            return None
        first, second = self._parts(state)
        low, high = learned.range_of(first, second, self._grid(before, "activation"))
        return dict(zip(state, learned.state_of(low, high, self._grid(now, "activation")), strict=False))

    def set_ends(self, state: Mapping[str, Tensor], format: Format, low: float, high: float) -> None:
        """What the parameter of an activation starts with; ends of zeros set nothing."""
        if low == high == 0:
            return
        ends = (torch.full_like(self._parts(state)[0], end) for end in (min(low, 0.0), max(high, 0.0)))
        self._write(state, format, *ends)

    def ends(self, state: Mapping[str, Tensor], format: Format) -> tuple[float, float]:
        """The least and the greatest value of the codes of an activation."""
        low, high = learned.range_of(*self._parts(state), self._grid(format, "activation"))
        return low.item(), high.item()

    def qparams_of_ends(self, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """As the method has them: powers of two for "tqt", the zero point at one end or in the middle for some."""
        scale, point = learned.qparams_of(low, high, self._grid(format, "activation"))
        return scale, point.to(torch.int32)

    def follow(self, state: Mapping[str, Tensor], format: Format, low: float, high: float) -> bool:
        """Multiplies both ends of the range that an activation's codes span; one that is not set stays."""
        if self.is_set(state) and (low, high) != (1.0, 1.0):
            ends = learned.range_of(*self._parts(state), self._grid(format, "activation"))
            self._write(state, format, ends[0] * low, ends[1] * high)
        return True

    @torch.no_grad()
    def _write(self, state: Mapping[str, Tensor], format: Format, low: Tensor, high: Tensor) -> None:
        found = learned.state_of(low, high, self._grid(format, "activation"))
        for value, new in zip(state.values(), found, strict=False):
            value.copy_(new)

    def describe(self, state: Mapping[str, Tensor]) -> str:
        """``scale 0.0123, zero_point 128``; of several, the least and the greatest."""
        if not self.is_set(state):
            return UNSET
        words = []
        for name, value in state.items():
            least, most = (value.abs() if name in ("scale", "alpha", "amax") else value).aminmax()
            number = f"{least.item():.4g}" if value.numel() == 1 else f"{least.item():.4g} … {most.item():.4g}"
            words.append(f"{name} {number}")
        return ", ".join(words)

    def suffix(self) -> str:
        """``lsq``."""
        return self.method

    def mode(self, observing: bool, resolved: bool) -> Mode:
        """TRAIN, or FIRST while it may be unset."""
        if observing:
            return Mode.TRAIN if resolved else Mode.FIRST
        return Mode.STATIC if resolved else Mode.RESOLVE

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams | None:
        """Scale and zero point of the state, with gradients in training; where it is unset, of the tensor."""
        first, second = self._parts(site.state)
        if site.mode.calibrates:
            found = self._started(site, value, "extend" if site.mode is Mode.EXTEND else "follow")
            self._store(site, self._agreed(site, found) if site.mode is Mode.OBSERVE else found)
            return None
        if site.mode in (Mode.RESOLVE, Mode.FIRST):
            first, second = self._resolved(site, value)
        trains = site.mode in (Mode.TRAIN, Mode.FIRST)
        apart = None if self.method == "lsq_plus" else second
        scale = site.call(LEARNED_SCALE, first, apart, *self._grid(site.format, site.role))
        factor = self._factor(site, value, scale) if trains else 0.0
        return Qparams(scale, self._zero_point(site, scale, second, trains), factor, self.method != "pact")

    def observe(self, site: SiteGraph, value: fx.Node) -> None:
        """Nothing: the first batch is stored before it is used."""

    def _parts(self, state: Mapping[str, Any]) -> tuple[Any, Any]:
        first, *rest = state.values()
        return first, rest[0] if rest else None

    def _grid(self, format: Format, role: str) -> Grid:
        floor = WEIGHT_SCALE_FLOOR if role == "weight" else ACTIVATION_SCALE_FLOOR
        return Grid(self.method, format.quant_min, format.quant_max, format.symmetric, floor)

    def _started(self, site: SiteGraph, value: fx.Node, how: How) -> tuple[fx.Node, fx.Node]:
        """The state after the tensor was seen, without gradient."""
        first, second = self._parts(site.state)
        now = [None if n is None else site.call(aten.detach.default, n) for n in (first, second)]
        return site.pair(LEARNED_START, value, *now, site.axis, *self._grid(site.format, site.role), self.init, how)

    def _resolved(self, site: SiteGraph, value: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The state, set by the tensor where it was not, with the gradients of the state; stored in training."""
        found = self._started(site, value, "resolve")
        if site.mode is Mode.FIRST:
            found = self._agreed(site, found)
        state = [n for n in self._parts(site.state) if n is not None]
        used = [site.call(STAND_IN, now, then) for now, then in zip(state, found, strict=False)]
        if site.mode is Mode.FIRST:
            self._store(site, found)
        return used[0], used[1] if len(used) > 1 else None

    def _agreed(self, site: SiteGraph, found: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The same on all ranks, of what each saw; weights are the same there."""
        return found if site.role == "weight" else (site.over_ranks(found[0]), site.over_ranks(found[1]))

    def _store(self, site: SiteGraph, found: tuple[fx.Node, fx.Node]) -> None:
        site.store(**dict(zip(site.state, found, strict=False)))

    def _zero_point(self, site: SiteGraph, scale: fx.Node, second: fx.Node | None, trains: bool) -> fx.Node:
        codes = site.format
        if second is None:
            like = site.call(aten.detach.default, scale)
            middle = self._grid(codes, site.role).middle
            return site.call(aten.full_like.default, like, middle, dtype=torch.int32)
        if self.method == "lsq_plus":
            second = site.call(LEARNED_ZERO_POINT, second, scale, codes.quant_min, codes.quant_max)
            if trains:
                return second
        return site.call(aten.to.dtype, second, torch.int32)

    def _factor(self, site: SiteGraph, value: fx.Node, scale: fx.Node) -> float:
        """What the gradient is multiplied by; of open sizes, that of the batch which is compiled for."""
        if self.gradient_scale is not None:
            return float(self.gradient_scale)
        if self.method not in _WITH_FACTOR:
            return 1.0
        sizes = [size if isinstance(size, int) else int(size.node.hint or 1) for size in value.meta["val"].shape]
        shared = math.prod(sizes) // scale.meta["val"].numel() if site.role == "weight" else math.prod(sizes[1:])
        return lsq_grad_factor(max(shared, 1), max(site.format.quant_max, 1))
