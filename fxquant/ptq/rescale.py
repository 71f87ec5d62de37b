"""What `equalize` and `smooth` share: channels scaled region by region, ranges moved along, errors measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.prepared.quantizer import Quantizer, quantizers
from fxquant.prepared.root import unwrap
from fxquant.probe.calibrate import observe_weights
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.changes import Changes, undone_on_error
from fxquant.ptq.products import Products, products_of
from fxquant.ptq.report import PtqReport, PtqRow, require_some
from fxquant.ptq.rescaling import Region, regions
from fxquant.ptq.running import Running, Seen, opened

Extremes = dict[str, tuple[float, float]]  # site → least and greatest value of its tensor in float
# Region and the largest magnitude of each of its channels → the factor of each, or why the region is left alone.
Choose = Callable[[Region, Tensor], Tensor | str]
Wanted = Callable[[Region], str | None]


class Rescaling:
    """One call of `equalize` or `smooth`.

    Attributes:
        regions: by the parameter that makes their channels: that of each graph which has it.
        factors: what each region's channels were divided by.
        declined: what was left alone, and why.
    """

    def __init__(self, running: Running, batches: list[Any], caller: str, progress: bool) -> None:
        self.running, self.batches, self.caller, self.progress = running, batches, caller, progress
        self.held = dict(quantizers(running.model))
        self.regions: dict[int, list[Region]] = {}
        self.factors: dict[int, Tensor] = {}
        self.declined: dict[str, str] = {}

    def find(self, wanted: Wanted) -> None:
        """Runs the model to see its graphs, and keeps the regions that ``wanted`` has nothing against in any."""
        self._run("graph", lambda graph: {}, quantized=False)
        products = Products(self.running.graphs)
        for graph in self.running.graphs:
            found, declined = regions(graph, products)
            self.declined.update(declined)
            for region in found:
                why = wanted(region) or self._why_not_moved(region)
                if why is None:
                    self.regions.setdefault(id(region.source.parts[0].tensor), []).append(region)
                else:
                    self.declined[region.source.key] = why
        for number, held in list(self.regions.items()):
            if held[0].source.key in self.declined:
                del self.regions[number]
        require_some(self.caller, self.regions, "layers between which channels can be scaled", self.declined.items())

    def _why_not_moved(self, region: Region) -> str | None:
        for site in region.sites:
            for key in region.graph.keys[site]:
                quantizer = self.held.get(key)
                if quantizer is not None and not quantizer.range.follow(quantizer.state, quantizer.spec, 1.0, 1.0):
                    return f"the range of {key} does not move with its tensor"
        return None

    def _run(self, what: str, watch: Callable[[BoundGraph], dict[fx.Node, Seen]], *, quantized: bool) -> None:
        def visit(batch: Any) -> None:
            self.running.run(batch, watch, quantized=quantized)

        self.running.over(self.batches, visit, f"{self.caller}: {what}", self.progress)

    def apply(self, changes: Changes, choose: Choose, amax: dict[int, Tensor]) -> float:
        """Scales every region once; the largest step, as a factor's logarithm."""
        largest = 0.0
        for number, held in list(self.regions.items()):
            region = held[0]
            factor = choose(region, amax.get(number, torch.ones(region.channels)))
            if isinstance(factor, str):
                self.declined[region.source.key] = factor
                del self.regions[number]
                continue
            factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
            for tensor, value in region.scaled(factor):
                changes.put(tensor, value)
            self.factors[number] = self.factors.get(number, torch.ones(())) * factor
            largest = max(largest, float(factor.log().abs().max()))
        return largest

    # What the data say

    def look(self) -> tuple[dict[int, Tensor], Extremes]:
        """In float: the largest magnitude in each channel of a region, and the extremes of each site."""
        amax: dict[int, Tensor] = {}
        extremes: Extremes = {}

        def watch(graph: BoundGraph) -> dict[fx.Node, Seen]:
            seen: dict[fx.Node, Seen] = {}
            for number, held in self.regions.items():
                for region in held:
                    if region.graph is graph:
                        seen |= {site: self._seen(number, region, site, amax, extremes) for site in region.sites}
            return seen

        self._run("channels", watch, quantized=False)
        return amax, extremes

    def _seen(self, number: int, region: Region, site: fx.Node, amax: dict[int, Tensor], extremes: Extremes) -> Seen:
        labels = region.sites[site].reshape(-1).long()

        def look(_: Callable[[fx.Node], Any], value: Tensor) -> None:
            if not value.numel():
                return
            before = amax.get(number, torch.zeros(region.channels, dtype=torch.float64))
            sizes = value.detach().double().abs().reshape(-1).cpu()
            amax[number] = before.scatter_reduce(0, labels, sizes, "amax")
            for key in region.graph.keys[site]:
                low, high = extremes.get(key, (float("inf"), -float("inf")))
                extremes[key] = min(low, float(value.min())), max(high, float(value.max()))

        return look

    def move_ranges(self, changes: Changes, before: Extremes, after: Extremes) -> None:
        """Ranges that are set are widened or narrowed as the extremes of their tensors have been."""
        for key, ends in before.items():
            quantizer = self.held.get(key)
            if quantizer is None or not quantizer.stateful or not quantizer.is_set():
                continue
            factors = [new / old if old and new / old > 0 else 1.0 for old, new in zip(ends, after[key], strict=True)]
            _follow(changes, quantizer, *factors)

    def start_weights(self, changes: Changes) -> None:
        """Scales of weights that are trained are found again, of the weights as they have become.

        After training, too: what it made of a scale belongs to the weights that it made it for.
        """
        trained = [q for q in self.held.values() if q.stateful and q.site.role == "weight"]
        for value in (value for q in trained for value in q.state.values()):
            changes.put(value, value)
        observe_weights(self.running.model, self.batches[0])

    def errors(self) -> dict[str, tuple[float, float]]:
        """Of the products that read a region: the squares of their results' errors, and of the results."""
        wanted = {product.key for held in self.regions.values() for region in held for product, _ in region.readers}
        sums: dict[str, tuple[float, float]] = {}
        kept: dict[str, list[Tensor]] = defaultdict(list)

        def keeping(graph: BoundGraph) -> dict[fx.Node, Seen]:
            return {one.node: _keep(kept[one.key]) for one in products_of(graph)[0] if one.key in wanted}

        def comparing(graph: BoundGraph) -> dict[fx.Node, Seen]:
            return {one.node: _compare(kept, one.key, sums) for one in products_of(graph)[0] if one.key in wanted}

        def visit(batch: Any) -> None:
            kept.clear()
            self.running.run(batch, keeping, quantized=False)
            self.running.run(batch, comparing, quantized=True)

        self.running.over(self.batches, visit, f"{self.caller}: errors", self.progress)
        return sums


def _keep(values: list[Tensor]) -> Seen:
    def keep(_: Callable[[fx.Node], Any], value: Tensor) -> None:
        values.append(value.detach())

    return keep


def _compare(kept: dict[str, list[Tensor]], key: str, sums: dict[str, tuple[float, float]]) -> Seen:
    def compare(_: Callable[[fx.Node], Any], value: Tensor) -> None:
        exact = kept[key].pop(0).double()
        error, size = sums.get(key, (0.0, 0.0))
        sums[key] = error + float((value.double() - exact).square().sum()), size + float(exact.square().sum())

    return compare


def _follow(changes: Changes, quantizer: Quantizer, low: float, high: float) -> None:
    state = {name: value.detach().clone() for name, value in quantizer.state.items()}
    quantizer.range.follow(state, quantizer.spec, low, high)
    for name, value in quantizer.state.items():
        changes.put(value, state[name])


def rescale(
    model: nn.Module,
    data: Iterable[Any],
    caller: str,
    choose: Choose,
    wanted: Wanted,
    *,
    sweeps: int = 1,
    enough: float = 0.0,
    progress: bool = True,
) -> PtqReport:
    """Scales the channels of every region as ``choose`` says, at most ``sweeps`` times over, and reports."""
    batches = list(data)
    with opened(unwrap(model), caller) as running, undone_on_error() as changes:
        one = Rescaling(running, batches, caller, progress)
        one.find(wanted)
        errors = one.errors()
        amax, extremes = one.look()
        for _ in range(sweeps):
            if one.apply(changes, choose, amax) <= enough:
                break
        require_some(caller, one.regions, "layers between which channels can be scaled", one.declined.items())
        one.move_ranges(changes, extremes, one.look()[1])
        one.start_weights(changes)
        after = one.errors()
        rows = [_row(held[0], one.factors[number], errors, after) for number, held in one.regions.items()]
    measure = "error of the products that read it, ‖y_q − y‖ / ‖y‖"
    return PtqReport(method=caller, measure=measure, rows=tuple(rows), declined=tuple(one.declined.items()))


def _row(region: Region, factor: Tensor, before: dict[str, Any], after: dict[str, Any]) -> PtqRow:
    keys = [product.key for product, _ in region.readers]
    note = f"÷ {float(factor.min()):.3g} … {float(factor.max()):.3g}, × in {region.read_by}"
    return PtqRow(key=region.source.key, before=_relative(keys, before), after=_relative(keys, after), note=note)


def _relative(keys: list[str], sums: dict[str, tuple[float, float]]) -> float:
    error, size = (sum(sums[key][i] for key in keys) for i in (0, 1))
    return float((error / size) ** 0.5) if size else 0.0
