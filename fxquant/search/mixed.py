"""`mixed`: the formats of the weights that harm the result least within a budget of bytes, or of float work."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.prepared.root import require_plan, unwrap
from fxquant.search.budget import check_budget, widths_on_target
from fxquant.search.choice import Option, cheapest
from fxquant.search.meters import Loss
from fxquant.search.sweep import Setting, Sweep, sweep
from fxquant.search.weights import Readers, Weight, alone_as, alone_with_activations, switched_on_weights
from fxquant.spec.quant_spec import QuantSpec
from fxquant.support.table import megabytes, table
from fxquant.targets.profiles import get_profile

_UNSEEN = 0.01  # share of the quantized model's effect that no wider format is bought for


class MixedRecipe(dict[str, QuantSpec | None]):
    """Site key → format, None for float, in the plan's order: `fxquant.override` takes it as it is.

    A weight in float takes with it the activations that only operators with float weights read. Weights that no batch
    ran are absent, and keep their formats.

    Attributes:
        effect: what the chosen formats alone should do to the result, a distance from the float model as in
            `fxquant.search.SensitivityReport`. It is put together from single measurements, as if errors were
            independent.
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
        data: as for `fxquant.sensitivity`.
        loss: as for `fxquant.sensitivity`.
        weight_bytes: the weights may take this share of their bytes in int8; each gets one of ``bits``.
        integer_share: at least this part of the products' multiply-adds must have all operands quantized; each
            operator with a weight keeps its formats or becomes float.
        bits: widths to choose from under ``weight_bytes``, None for float; those that the target lacks are left out.
            Leave out what it runs too slowly: a width is chosen for its error and its bytes alone.
        progress: as for `fxquant.sensitivity`.

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
    budget, share = check_budget(weight_bytes, integer_share)
    weights = switched_on_weights(plain, plan)
    if not weights:
        raise InvalidArgument("mixed must be given a model with quantized weights: got none that are switched on.")
    measure = functools.partial(sweep, plain, "mixed", data, loss, progress=progress)
    if budget == "weight_bytes":
        _refuse_small_floats(weights)
        return _by_bytes(plan, weights, measure, share, widths_on_target(bits, plan))
    return _by_share(plan, weights, measure, share)


def _refuse_small_floats(weights: dict[str, Weight]) -> None:
    """The widths that are chosen among are those of integers."""
    for key, weight in weights.items():
        if weight.site.local.spec.element is not None:
            raise InvalidArgument(
                f"mixed must be given a model whose weights are integers, of which it chooses the bits: got "
                f"{weight.site.local.spec} for {key}. Prepare with another base, as 'int8', or give integer_share."
            )


def _by_bytes(
    plan: Plan, weights: dict[str, Weight], measure: Callable[..., Sweep[Any]], share: float, widths: list[int | None]
) -> MixedRecipe:
    specs = {key: [_with_bits(w.site.local.spec, b, plan) for b in widths] for key, w in weights.items()}
    sums = measure(
        {
            (key, spec): Setting(visit=alone_as(weights[key], spec), keys=frozenset({key}))
            for key, those in specs.items()
            # At least one format is run: it tells the size.
            for spec in [s for s in those if s is not None] or [weights[key].site.local.spec]
        }
    )
    ran = {key: weight for key, weight in weights.items() if weight.count}
    options = [
        [Option(s, 0.0 if s is None else sums.costs[key, s], w.bytes(s)) for s in specs[key]] for key, w in ran.items()
    ]
    whole = sum(weight.count for weight in ran.values())
    chosen = cheapest(options, math.floor(share * whole + 1e-9), _negligible(sums))
    if chosen is None:
        least = sum(min(option.price for option in those) for those in options) / whole
        raise InvalidArgument(
            f"weight_bytes must be at least {_up(least)}, what the narrowest of bits={widths} takes: got {share:g}."
        )
    return _recipe(plan, ran, dict(zip(ran, chosen, strict=True)), sums, f"weight_bytes={share:g}")


def _with_bits(spec: QuantSpec, bits: int | None, plan: Plan) -> QuantSpec | None:
    """The format in another width, with a scale per channel where the target has no groups of that width."""
    if bits is None:
        return None
    size = spec.group_size if bits in get_profile(plan.target).group_bits else None
    return dataclasses.replace(spec, bits=bits, group_size=size)


def _by_share(plan: Plan, weights: dict[str, Weight], measure: Callable[..., Sweep[Any]], share: float) -> MixedRecipe:
    readers = Readers(plan)
    settings = {
        key: Setting(visit=alone_with_activations(weight, readers), keys=frozenset({key}))
        for key, weight in weights.items()
    }
    sums = measure(settings, operator_runs=readers.operator_runs)
    ran = {key: weight for key, weight in weights.items() if weight.count}
    integer = [one for one in sums.operator_runs if one.is_integer]
    options = []
    for key, weight in ran.items():
        macs = sum(one.macs for one in integer if key in one.keys)
        keep = Option(weight.site.local.spec, sums.costs[key], 0)
        options.append([keep, Option(None, 0.0, macs)] if macs else [keep])
    total = sum(one.macs for one in sums.operator_runs)
    now = sum(one.macs for one in integer)
    if now < share * total:
        most = math.floor(1e4 * now / total) / 1e4
        raise InvalidArgument(
            f"integer_share must be at most {most:g}, where every quantized operator stays quantized: got {share:g}."
        )
    chosen = cheapest(options, math.floor(now - share * total), _negligible(sums))
    assert chosen is not None, "keeping every format costs nothing of the budget"
    return _recipe(plan, ran, dict(zip(ran, chosen, strict=True)), sums, f"integer_share={share:g}")


def _negligible(sums: Sweep[Any]) -> float:
    """The cost that moves the effect of all sites together by `_UNSEEN`; 0 where that effect is not finite."""
    share = (1 + _UNSEEN) ** 2 - 1 if sums.measure == "output error" else _UNSEEN  # of squares, and of a loss
    return share * abs(sums.every) if math.isfinite(sums.every) else 0.0


def _recipe(
    plan: Plan, weights: dict[str, Weight], chosen: dict[str, Option], sums: Sweep[Any], budget: str
) -> MixedRecipe:
    floats = {key for key, option in chosen.items() if option.spec is None}
    floats |= Readers(plan, sums.operator_runs).only_for(floats) if floats else set()
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
    macs = sum(one.macs for one in sums.operator_runs)
    integer = sum(one.macs for one in sums.operator_runs if one.is_integer and one.keys.isdisjoint(floats))
    return MixedRecipe(
        formats,
        effect=sums.effect(sum(option.cost for option in chosen.values())),
        measure=sums.measure,
        weight_bytes=sum(weights[key].bytes(option.spec) for key, option in chosen.items()),
        int8_bytes=sum(weight.count for weight in weights.values()),
        integer_share=integer / macs if macs else 0.0,
        rows=[(key, str(o.spec or "float"), f"{sums.effect(o.cost):.4g}") for key, o in chosen.items()],
    )


def _up(number: float) -> str:
    """To four digits, never below."""
    return f"{math.ceil(number * 1e4 - 1e-9) / 1e4:g}"
