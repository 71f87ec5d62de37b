"""`mixed`: the formats of the weights that harm the result least within a budget of bytes, or of float work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.ops import fake_quantize, qparams
from fxquant.plan.plan import Plan, Site
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan, unwrap
from fxquant.search.switching import Look, Loss, Setting, Sweep, Use, only, sweep
from fxquant.spec.quant_spec import QuantSpec
from fxquant.support.table import megabytes, table
from fxquant.targets.profiles import get_profile

_MOST_POINTS = 20_000  # of the frontier that the choice keeps: above, it is thinned
_UNSEEN = 0.01  # share of the quantized model's effect that no wider format is bought for
Budget = Literal["weight_bytes", "integer_share"]


class MixedRecipe(dict[str, QuantSpec | None]):
    """Site key → format, None for float, in the plan's order: `fxquant.override` takes it as it is.

    A weight in float takes with it the activations that only operators with float weights read. Weights that no batch
    ran are absent, and keep their formats.

    Attributes:
        effect: what the chosen formats alone should do to the result, a distance from the float model as in
            `fxquant.SensitivityReport`. It is put together from single measurements, as if errors were independent.
        weight_bytes: bytes of the weights' codes, scales not counted; float weights at their own width.
        int8_bytes: what they would be with 8 bits each.
        integer_share: part of the products' multiply-adds whose operands are all quantized, 0 to 1.
    """

    def __init__(
        self, formats: Mapping[str, QuantSpec | None], *, effect: float, measure: str, weight_bytes: int,
        int8_bytes: int, integer_share: float, rows: Sequence[tuple[str, str, str]],
    ) -> None:  # fmt: skip
        super().__init__(formats)
        self.effect, self.measure = effect, measure
        self.weight_bytes, self.int8_bytes, self.integer_share = weight_bytes, int8_bytes, integer_share
        self._rows = rows

    def __str__(self) -> str:
        size = megabytes(self.weight_bytes) if self.weight_bytes >= 1000 else f"{self.weight_bytes} bytes"
        share = f", {self.weight_bytes / self.int8_bytes:.3g} of int8's" if self.int8_bytes else ""
        title = (
            f"{size} of weights{share}; {100 * self.integer_share:.1f} % of multiply-adds on "
            f"integers; predicted {self.measure} {self.effect:.4g}"
        )
        return f"{title}\n{table(('weight', 'format', 'effect alone'), self._rows)}"


@dataclass(frozen=True)
class _Option:
    """A format that one weight may get: what it costs the result, and what it takes from the budget."""

    spec: QuantSpec | None
    cost: float
    price: int


@dataclass(frozen=True)
class _Weight:
    site: Site
    count: int  # elements
    float_bytes: int  # of one element

    def bytes(self, spec: QuantSpec | None) -> int:
        return self.count * self.float_bytes if spec is None else -(-self.count * spec.bits // 8)


def mixed(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    weight_bytes: float | None = None,
    integer_share: float | None = None,
    bits: Sequence[int | None] = (4, 8, 16, None),
    progress: bool = True,
) -> MixedRecipe:
    """The formats of a prepared model's weights that keep the result close to float within one budget.

    Args:
        data, loss, progress: as for `fxquant.sensitivity`.
        weight_bytes: the weights may take this share of their bytes in int8; each gets one of ``bits``.
        integer_share: at least this part of the products' multiply-adds must have all operands quantized; each
            operator with a weight keeps its formats or becomes float.
        bits: widths to choose from under ``weight_bytes``, None for float; those that the target lacks are left out.
            Leave out what it runs too slowly: a width is chosen for its error and its bytes alone.

    Each weight is measured alone in each format, the rest in float: a run for each format and batch, no compile. The
    squared output errors, or the increases of the loss, are taken to add up; their least sum within the budget is
    found exactly (of more than 20 000 undominated choices, nearly). Of all choices that are predicted to move the
    effect of the whole quantized model by at most 1 % from there, the one of least bytes, or of most integer work, is
    taken: a wider format for a gain that nobody can measure is none.

    >>> fxquant.override(model, fxquant.mixed(model, [x], weight_bytes=0.6))

    `fxquant.Mixed` does this within `fxquant.prepare`.

    Raises:
        InvalidArgument: as `fxquant.sensitivity`; not exactly one budget; one that no choice keeps, with the nearest
            that can be reached; one under which no site of the model would stay quantized.
        RangeNotSet: as `fxquant.sensitivity`.
    """
    plan = require_plan(model, "mixed")
    plain = unwrap(model)
    budget, amount = check_budget(weight_bytes, integer_share)
    weights = _weights(plain, plan)
    if not weights:
        raise InvalidArgument("mixed must be given a model with quantized weights: got none that are switched on.")
    if budget == "weight_bytes":
        return _by_bytes(plain, plan, weights, data, loss, amount, _widths(bits, plan), progress)
    return _by_share(plain, plan, weights, data, loss, amount, progress)


def check_budget(weight_bytes: float | None, integer_share: float | None) -> tuple[Budget, float]:
    """The one budget that is given."""
    if (weight_bytes is None) == (integer_share is None):
        given = "none" if weight_bytes is None else "both"
        raise InvalidArgument(f"mixed must be given one budget, weight_bytes or integer_share: got {given}.")
    if weight_bytes is not None:
        if not (0 < weight_bytes < math.inf):
            raise InvalidArgument(f"weight_bytes must be a positive share of the int8 bytes: got {weight_bytes}.")
        return "weight_bytes", weight_bytes
    assert integer_share is not None
    if not 0 <= integer_share <= 1:
        raise InvalidArgument(f"integer_share must be from 0 to 1: got {integer_share}.")
    return "integer_share", integer_share


def check_bits(bits: Sequence[int | None]) -> None:
    """Raises InvalidArgument for what is no list of widths."""
    wrong = [b for b in bits if b is not None and not (isinstance(b, int) and 2 <= b <= 16)]
    if wrong or not bits:
        raise InvalidArgument(f"bits must hold widths from 2 to 16, or None for float: got {list(bits)}.")


def _widths(bits: Sequence[int | None], plan: Plan) -> list[int | None]:
    check_bits(bits)
    known = get_profile(plan.target).weight_bits
    found = [b for b in dict.fromkeys(bits) if b is None or b in known]
    if not found:
        raise InvalidArgument(
            f"bits must hold a width of target {plan.target!r}, {known.start} to {known.stop - 1}: got {list(bits)}."
        )
    return found


def _weights(model: nn.Module, plan: Plan) -> dict[str, _Weight]:
    """The weight sites that are on; sizes are filled in by the first run."""
    on = {key for key, quantizer in quantizers(model) if quantizer.enabled}
    return {s.key: _Weight(s, 0, 0) for s in plan.sites if s.local.role == "weight" and s.key in on}


def _requantizing(key: str, spec: QuantSpec, sizes: dict[str, _Weight]) -> Look:
    """Only this weight, in another format, as `InsertFakeQuantize` computes it."""

    def look(keys: tuple[str, ...], x: Tensor, quantized: Any) -> Tensor:
        if key not in keys:
            return x
        sizes[key] = dataclasses.replace(sizes[key], count=x.numel(), float_bytes=x.element_size())
        site, axis, rows = sizes[key].site, spec.axis, x
        if site.local.spec.group_size is not None and site.matrix is not None:  # x has a group in each row
            axis, rows = 0, x.reshape(-1, spec.group_size or site.matrix[1])
        scale, zero_point = qparams.SYMMETRIC_QPARAMS(rows, axis, spec.quant_max)
        limits = (spec.quant_min, spec.quant_max)
        if axis is None:
            return fake_quantize.PER_TENSOR(x, scale, zero_point, *limits, rounding=spec.rounding)
        y = fake_quantize.PER_CHANNEL(rows, scale, zero_point, axis, *limits, rounding=spec.rounding)
        return y.reshape(x.shape)

    return look


def _by_bytes(
    model: nn.Module,
    plan: Plan,
    weights: dict[str, _Weight],
    data: Iterable[Any],
    loss: Loss | None,
    share: float,
    widths: list[int | None],
    progress: bool,
) -> MixedRecipe:
    specs = {key: [_with_bits(w.site.local.spec, b, plan) for b in widths] for key, w in weights.items()}
    settings = {
        (key, spec): Setting(look=_requantizing(key, spec, weights), keys=frozenset({key}))
        for key, those in specs.items()
        # At least one format is run: it tells the size.
        for spec in [s for s in those if s is not None] or [weights[key].site.local.spec]
    }
    found = sweep(model, "mixed", data, loss, settings, progress=progress)
    ran = {key: weight for key, weight in weights.items() if weight.count}
    options = [
        [_Option(s, 0.0 if s is None else found.costs[key, s], w.bytes(s)) for s in specs[key]]
        for key, w in ran.items()
    ]
    whole = sum(weight.count for weight in ran.values())
    chosen = cheapest(options, math.floor(share * whole + 1e-9), _negligible(found))
    if chosen is None:
        least = sum(min(option.price for option in those) for those in options) / whole
        raise InvalidArgument(
            f"weight_bytes must be at least {_up(least)}, what the narrowest of bits={widths} takes: got {share:g}."
        )
    return _recipe(plan, ran, dict(zip(ran, chosen, strict=True)), found, f"weight_bytes={share:g}")


def _with_bits(spec: QuantSpec, bits: int | None, plan: Plan) -> QuantSpec | None:
    """The format in another width, with a scale per channel where the target has no groups of that width."""
    if bits is None:
        return None
    size = spec.group_size if bits in get_profile(plan.target).group_bits else None
    return dataclasses.replace(spec, bits=bits, group_size=size)


def _by_share(
    model: nn.Module,
    plan: Plan,
    weights: dict[str, _Weight],
    data: Iterable[Any],
    loss: Loss | None,
    share: float,
    progress: bool,
) -> MixedRecipe:
    readers = _Readers(plan)
    settings = {key: Setting(look=_grouped(key, readers, weights), keys=frozenset({key})) for key in weights}
    found = sweep(model, "mixed", data, loss, settings, progress=progress, uses=readers.uses)
    ran = {key: weight for key, weight in weights.items() if weight.count}
    options = []
    for key, weight in ran.items():
        macs = sum(use.macs for use in readers.uses if key in use.keys and use.is_integer)
        keep = _Option(weight.site.local.spec, found.costs[key], 0)
        options.append([keep, _Option(None, 0.0, macs)] if macs else [keep])
    total = sum(use.macs for use in readers.uses)
    now = sum(use.macs for use in readers.uses if use.is_integer)
    if now < share * total:
        most = math.floor(1e4 * now / total) / 1e4
        raise InvalidArgument(
            f"integer_share must be at most {most:g}, where every quantized operator stays quantized: got {share:g}."
        )
    chosen = cheapest(options, math.floor(now - share * total), _negligible(found))
    assert chosen is not None, "keeping every format costs nothing of the budget"
    return _recipe(plan, ran, dict(zip(ran, chosen, strict=True)), found, f"integer_share={share:g}")


def _negligible(found: Sweep[Any]) -> float:
    """The cost that moves the effect of all sites together by `_UNSEEN`; 0 where that effect is not finite."""
    share = (1 + _UNSEEN) ** 2 - 1 if found.measure == "output error" else _UNSEEN  # of squares, and of a loss
    return share * abs(found.every) if math.isfinite(found.every) else 0.0


def _grouped(key: str, readers: _Readers, sizes: dict[str, _Weight]) -> Look:
    """Only this weight, and the activations that its operators alone read."""

    def look(keys: tuple[str, ...], x: Tensor, quantized: Any) -> Tensor:
        if key in keys:
            sizes[key] = dataclasses.replace(sizes[key], count=x.numel(), float_bytes=x.element_size())
        return only(readers.only_for({key}) | {key})(keys, x, quantized)

    return look


class _Readers:
    """Which operators read through which sites, as far as batches have run."""

    def __init__(self, plan: Plan, uses: list[Use] | None = None) -> None:
        self.activations = {site.key for site in plan.sites if site.local.role == "activation"}
        self.uses = [] if uses is None else uses
        self._known = -1
        self._by_site: dict[str, set[frozenset[str]]] = {}

    def only_for(self, weights: Collection[str]) -> set[str]:
        """Activations every reader of which has one of these weights."""
        if self._known != len(self.uses):
            self._known, self._by_site = len(self.uses), {}
            for use in self.uses:
                for key in use.keys & self.activations:
                    self._by_site.setdefault(key, set()).add(use.keys)
        return {key for key, those in self._by_site.items() if not any(keys.isdisjoint(weights) for keys in those)}


def cheapest(options: Sequence[Sequence[_Option]], budget: int, slack: float = 0.0) -> list[_Option] | None:
    """One option of each list, with the summed price within budget; None if nothing is.

    Their summed cost is at most ``slack`` above the least one within budget, and of all such sums theirs has the
    least price. Of sums that neither cost nor price tells apart, the first is kept. Exact while at most `_MOST_POINTS`
    sums are undominated; then the frontier is thinned, and the sum may be a little above the least.
    """
    least = [min(option.price for option in those) for those in options]
    points: list[tuple[int, float, Any]] = [(0, 0.0, None)]
    for index, those in enumerate(options):
        room = budget - sum(least[index + 1 :])
        grown = [
            (price + option.price, cost + option.cost, (option, chain))
            for price, cost, chain in points
            for option in those
            if price + option.price <= room
        ]
        grown.sort(key=lambda point: point[:2])
        points = []
        for point in grown:
            if not points or point[1] < points[-1][1]:
                points.append(point)
        points = points[:: -(-len(points) // _MOST_POINTS)] if points else []
    if not points:
        return None
    # Prices rise and costs fall along the frontier.
    chain = next(chain for _, cost, chain in points if cost <= points[-1][1] + slack)
    found = []
    while chain is not None:
        option, chain = chain
        found.append(option)
    return found[::-1]


def _recipe(
    plan: Plan, weights: dict[str, _Weight], chosen: dict[str, _Option], found: Sweep[Any], budget: str
) -> MixedRecipe:
    floats = {key for key, option in chosen.items() if option.spec is None}
    floats |= _Readers(plan, found.uses).only_for(floats) if floats else set()
    formats = {
        site.key: chosen[site.key].spec if site.key in chosen else None
        for site in plan.sites
        if site.key in chosen or site.key in floats
    }
    if len(formats) == len(plan.sites) and not any(formats.values()):
        raise InvalidArgument(
            f"the budget must leave a site quantized: got {budget}, under which every weight, and with it every site, "
            "is best in float. Allow less, or fxquant.strip the model."
        )
    macs = sum(use.macs for use in found.uses)
    integer = sum(use.macs for use in found.uses if use.is_integer and use.keys.isdisjoint(floats))
    return MixedRecipe(
        formats,
        effect=found.effect(sum(option.cost for option in chosen.values())),
        measure=found.measure,
        weight_bytes=sum(weights[key].bytes(option.spec) for key, option in chosen.items()),
        int8_bytes=sum(weight.count for weight in weights.values()),
        integer_share=integer / macs if macs else 0.0,
        rows=[(key, str(o.spec or "float"), f"{found.effect(o.cost):.4g}") for key, o in chosen.items()],
    )


def _up(number: float) -> str:
    """To four digits, never below."""
    return f"{math.ceil(number * 1e4 - 1e-9) / 1e4:g}"
