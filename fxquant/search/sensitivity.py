"""`sensitivity`: what each quantizer of a model costs, measured with it alone and with all but it.

The model is compiled once for each shape of batch, with every quantizer in the graph. A run then decides site by site
whether the quantized tensor goes on or the float one, so a site costs two runs for each batch and no compile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan, unwrap
from fxquant.search.chart import draw_bars
from fxquant.search.meters import Loss
from fxquant.search.sweep import Setting, Sweep, all_but, only, sweep
from fxquant.support.table import table


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """One site.

    Attributes:
        key, role, spec: as `fxquant.explain` shows them.
        sqnr_db: signal to quantization noise of the tensor over all batches, ``10 · log₁₀(Σ x² / Σ (q(x) − x)²)``,
            after the quantizers before it; ``inf`` where nothing was lost.
        alone: the effect with only this site on.
        without: the effect with every site on but this one.
        rank: 1 for the largest ``alone``.
    """

    key: str
    role: str
    spec: str
    sqnr_db: float
    alone: float
    without: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """What `sensitivity` measured; prints as a table, largest effect first.

    An effect is a distance from the float model. Without a loss: ``‖y − y₀‖ / ‖y₀‖`` of the outputs over all batches.
    With one: the mean of the loss over the batches, less that of the float model, so it can be negative.

    Attributes:
        rows: every site that the data ran, by rank.
        measure: ``"output error"`` or ``"loss"``.
        every: the effect with every site on.
        float_loss: the float model's mean loss; None without a loss.
        unmeasured: sites that no batch ran quantized: switched off, not reached, or in a frame that Dynamo left eager.
    """

    rows: tuple[SensitivityRow, ...]
    measure: str
    every: float
    float_loss: float | None
    unmeasured: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite SQNR stays a float, which JSON spells ``Infinity``."""
        return {**vars(self), "rows": [asdict(row) for row in self.rows], "unmeasured": list(self.unmeasured)}

    def __str__(self) -> str:
        title = f"sensitivity of {len(self.rows)} sites by {self.measure}; {self.every:.4g} with all of them on"
        if self.float_loss is not None:
            title += f", above {self.float_loss:.4g} in float"
        header = ("rank", "site", "role", "format", "SQNR [dB]", "alone", "without")
        cells = [
            (r.rank, r.key, r.role, r.spec, f"{r.sqnr_db:.1f}", f"{r.alone:.4g}", f"{r.without:.4g}") for r in self.rows
        ]
        parts = [title, table(header, cells)]
        if self.unmeasured:
            parts.append(f"\nnot measured, since no batch ran them quantized: {', '.join(self.unmeasured)}")
        return "\n".join(parts)

    def plot(self, path: str | Path, *, most: int = 40) -> None:
        """Writes a bar chart of the ``most`` sensitive sites, as SVG or PNG by the suffix of ``path``.

        Bars show the effect of each site alone, colored by role; the dashed line is the effect of all together.
        Raises MissingDependency without matplotlib, InvalidArgument for another suffix.
        """
        if most < 1:
            raise InvalidArgument(f"most must be at least 1: got {most}.")
        draw_bars(path, self.rows[:most], self.every, self.measure)


def sensitivity(
    model: nn.Module, data: Iterable[Any], loss: Loss | None = None, *, progress: bool = True
) -> SensitivityReport:
    """Ranks the sites of a prepared model with ranges by what quantizing each of them does to the result.

    Args:
        data: batches as for `fxquant.calibrate`; with ``loss``, pairs of such a batch and a target. Read once.
        loss: called with the model's output and the target, gives one number; the mean over the batches counts.
        progress: draw a bar on a terminal.

    Evaluates without gradients, with the kernels of ``"fxquant_eager"``. Ranges, modes, buffers and random state are
    as before, also after an error. A batch takes ``2 · sites + 2`` runs, a new shape of batch one compile more.

    >>> print(fxquant.sensitivity(model, [x]))

    Raises:
        InvalidArgument: an unprepared model, no data or data of another shape, a model without float output and no
            loss, a loss that is not one finite number, or no site that ran quantized.
        RangeNotSet: a site that the data runs has no range yet.
    """
    plan = require_plan(model, "sensitivity")
    plain = unwrap(model)
    keys = [key for key, quantizer in quantizers(plain) if quantizer.is_on]
    settings: dict[tuple[str, str], Setting] = {}
    for key in keys:
        settings["alone", key] = Setting(visit=only({key}), keys=frozenset({key}))
        settings["without", key] = Setting(visit=all_but({key}), keys=frozenset({key}), rest_on=True)
    return _report(plan, sweep(plain, "sensitivity", data, loss, settings, progress=progress))


def _report(plan: Plan, sums: Sweep[tuple[str, str]]) -> SensitivityReport:
    measured = [site for site in plan.sites if site.key in sums.noise]
    effect = {name: sums.effect(cost) for name, cost in sums.costs.items()}
    order = {site.key: i for i, site in enumerate(measured)}
    measured.sort(key=lambda site: (-effect["alone", site.key], effect["without", site.key], order[site.key]))
    rows = tuple(
        SensitivityRow(
            key=site.key,
            role=site.local.role,
            spec=str(site.local.spec),
            sqnr_db=_decibel(*sums.noise[site.key]),
            alone=effect["alone", site.key],
            without=effect["without", site.key],
            rank=rank,
        )
        for rank, site in enumerate(measured, start=1)
    )
    return SensitivityReport(
        rows=rows,
        measure=sums.measure,
        every=sums.effect(sums.every),
        float_loss=sums.float_loss,
        unmeasured=tuple(site.key for site in plan.sites if site.key not in sums.noise),
    )


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
