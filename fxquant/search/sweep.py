"""Runs of a prepared model in which every site can be switched, without a compile for each.

The compiled graph holds every quantizer, and the float tensor in front of it: a run chooses which of the two goes on.
Scales are those of the whole quantized graph, also where sites share one and only one of them is on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fxquant.capture.aside import untouched
from fxquant.errors import InvalidArgument, RangeNotSet
from fxquant.prepared.quantizer import quantizers
from fxquant.probe.visitor import Run, Use, Visit, visiting
from fxquant.search.meters import ErrorMeter, Loss, LossMeter, parts
from fxquant.search.operator_runs import OperatorLog, OperatorRun
from fxquant.support.progress import track

Name = TypeVar("Name", bound=Hashable)


def only(chosen: Set[str]) -> Visit:
    """Quantizes these sites and no other."""
    return lambda use: use.input if chosen.isdisjoint(use.keys) else None


def all_but(chosen: Set[str]) -> Visit:
    """Quantizes every site but these."""
    return lambda use: use.input if chosen >= set(use.keys) else None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the model. It differs from all sites off (``rest_on``: all on) at ``keys`` only."""

    visit: Visit
    keys: frozenset[str]
    rest_on: bool = False


@dataclass
class Sweep(Generic[Name]):
    """Costs of the settings over all batches; what they sum up to is additive, `effect` makes it readable.

    Attributes:
        every: the cost of all sites on.
        noise: site → sums of squares of its tensor and of its error, for the sites that ran.
        operator_runs: operators of every batch.
        total: what costs are a share of: the squared norm of the float outputs, or the batches.
    """

    measure: str
    costs: dict[Name, float]
    every: float = 0.0
    noise: dict[str, tuple[float, float]] = field(default_factory=dict)
    operator_runs: list[OperatorRun] = field(default_factory=list)
    total: float = 0.0
    loss_sum: float = 0.0

    @property
    def float_loss(self) -> float | None:
        """Mean over the batches."""
        return self.loss_sum / self.total if self.measure == "loss" else None

    def effect(self, cost: float) -> float:
        """Relative error of the output, or mean increase of the loss."""
        share = cost / self.total if self.total else math.copysign(math.inf, cost) if cost else 0.0
        return share if self.measure == "loss" else math.sqrt(share)


def sweep(
    model: nn.Module,
    caller: str,
    data: Iterable[Any],
    loss: Loss | None,
    settings: Mapping[Name, Setting],
    *,
    progress: bool,
    operator_runs: list[OperatorRun] | None = None,
) -> Sweep[Name]:
    """Measures a prepared model under every setting on every batch; the model is as before at the end.

    ``operator_runs`` becomes the sweep's: visits of the settings may read there which operators the batch in hand ran.
    """
    sums: Sweep[Name] = Sweep("output error" if loss is None else "loss", dict.fromkeys(settings, 0.0))
    sums.operator_runs = [] if operator_runs is None else operator_runs
    log = OperatorLog(sums.operator_runs)
    with _opened(model, caller, log) as run:
        runs: Iterable[None] = _Sweeping(model, caller, loss, settings, sums, run, log).runs(data)
        if isinstance(data, Sized):
            runs = _Counted(runs, len(data) * (len(settings) + 1))
        for _ in track(runs, "measuring", show=progress):
            pass
    if not sums.total and not sums.noise:
        raise InvalidArgument("data must hold at least one batch: got none.")
    if not sums.noise:
        raise InvalidArgument(
            f"{caller} must be given data that runs a quantized site: got none that ran. "
            "fxquant.explain(model) shows the state of every site."
        )
    return sums


@contextlib.contextmanager
def _opened(model: nn.Module, caller: str, log: OperatorLog) -> Iterator[Run]:
    """A way to run the model, with the same random numbers each time; the model is as before at the end."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with untouched(model), visiting(model, caller, log.watch) as step:

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any], visit: Visit) -> Any:
            with torch.random.fork_rng(devices=devices):
                return step(args, kwargs, visit)

        yield run


class _Counted:
    """Runs whose number a progress bar can know."""

    def __init__(self, runs: Iterable[None], count: int) -> None:
        self.iterable, self.count = runs, count

    def __iter__(self) -> Iterator[None]:
        return iter(self.iterable)

    def __len__(self) -> int:
        return self.count


class _Sweeping(Generic[Name]):
    """A sweep in progress."""

    def __init__(
        self,
        model: nn.Module,
        caller: str,
        loss: Loss | None,
        settings: Mapping[Name, Setting],
        sums: Sweep[Name],
        run: Run,
        log: OperatorLog,
    ) -> None:
        self.caller, self.loss, self.settings = caller, loss, settings
        self.sums, self.run, self.log = sums, run, log
        self.unset = {k for k, q in quantizers(model) if q.is_on and not q.is_set()}

    def runs(self, data: Iterable[Any]) -> Iterator[None]:
        """Does the runs, one or more before each item."""
        for batch in data:
            (args, kwargs), target = parts(batch, self.loss)
            seen: set[str] = set()
            reference = self.run(args, kwargs, _noting(seen))
            self._require_ranges(seen)
            meter = ErrorMeter(reference) if self.loss is None else LossMeter(self.loss, reference, target)
            self.sums.total += meter.total
            self.sums.loss_sum += meter.float_loss
            self.log.open = True
            every = meter.cost(self.run(args, kwargs, _measuring(self.sums.noise)))
            self.log.open = False
            self.sums.every += every
            yield
            for name, setting in self.settings.items():
                if setting.keys.isdisjoint(seen):  # equal to its baseline, which has run
                    self.sums.costs[name] += every if setting.rest_on else 0.0
                else:
                    self.sums.costs[name] += meter.cost(self.run(args, kwargs, setting.visit))
                yield

    def _require_ranges(self, seen: Set[str]) -> None:
        if seen & self.unset:
            names = ", ".join(sorted(seen & self.unset)[:4])
            raise RangeNotSet(
                f"{self.caller} must be given a model whose ranges are set: got none for {names}. "
                "Run fxquant.calibrate(model, data) first."
            )


def _noting(seen: set[str]) -> Visit:
    """Quantizes nothing, and notes what could be."""

    def visit(use: Use) -> Tensor:
        seen.update(use.keys)
        return use.input

    return visit


def _measuring(noise: dict[str, tuple[float, float]]) -> Visit:
    """Quantizes every site, and adds up its signal and its noise."""

    def visit(use: Use) -> None:
        signal = use.input.double()
        sums = float(signal.square().sum()), float((use.quantized.double() - signal).square().sum())
        for key in use.keys:
            before = noise.get(key, (0.0, 0.0))
            noise[key] = before[0] + sums[0], before[1] + sums[1]

    return visit
