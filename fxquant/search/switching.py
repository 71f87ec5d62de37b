"""Runs of a prepared model in which every site can be switched, without a compile for each.

The compiled graph holds every quantizer, and the float tensor in front of it: a run chooses which of the two goes on.
Scales are those of the whole quantized graph, also where sites share one and only one of them is on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn

from fxquant.backend.eager import aot_eager
from fxquant.backend.quantize import quantize_graph
from fxquant.capture.aside import compiled_aside, evaluating, untouched
from fxquant.errors import InvalidArgument, RangeNotSet
from fxquant.graph.bodies import execution_order
from fxquant.graph.flops import attention_flops, flops
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.moves import passes_values, unmoved
from fxquant.ops import fake_quantize
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan
from fxquant.probe.calibrate import batch_arguments
from fxquant.support.progress import track

Loss = Callable[[Any, Any], Any]

# Called with the keys of the sites that share a quantizer, its float input, and what computes the quantized tensor;
# gives the tensor that goes on.
Look = Callable[[tuple[str, ...], Tensor, Callable[[], Tensor]], Tensor]
Name = TypeVar("Name", bound=Hashable)


def only(chosen: set[str]) -> Look:
    """Quantizes these sites and no other."""
    return lambda keys, x, quantized: x if chosen.isdisjoint(keys) else quantized()


def all_but(chosen: set[str]) -> Look:
    """Quantizes every site but these."""
    return lambda keys, x, quantized: x if chosen.issuperset(keys) else quantized()


@dataclass(frozen=True)
class Use:
    """One run of an operator: its multiply-adds, and by operand the keys of the sites that it reads through."""

    kind: str
    macs: int
    operands: dict[str, tuple[str, ...]]

    @property
    def keys(self) -> frozenset[str]:
        """The sites of all operands."""
        return frozenset(key for keys in self.operands.values() for key in keys)

    @property
    def is_integer(self) -> bool:
        """Whether it is a product of quantized operands."""
        return self.macs > 0 and all(self.operands.values())


@dataclass(frozen=True)
class _GraphSite:
    """A fake-quant node's sites as its graph names them; ``state`` is the input that holds the first one's minimum."""

    labels: tuple[str, ...]
    state: int | None


class Bench:
    """A prepared model, compiled aside; `run` evaluates it with a say about every site.

    Uses of operators are collected in ``uses`` while that is a list.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.uses: list[Use] | None = None
        self._look: Look = only(set())
        self._keys: list[tuple[str, ...]] = []  # of the graph that runs, by fake-quant node
        found = dict(quantizers(model))
        self._by_state = {id(q.min_val): key for key, q in found.items() if q.stateful}
        # What is an input of every graph that binds the site: its range, or a parameter of its owner.
        self._evidence: dict[str, set[int]] = {
            site.key: {id(found[site.key].min_val)}
            if found[site.key].stateful
            else set(map(id, model.get_submodule(site.owner).parameters()))
            for site in require_plan(model, "sensitivity").sites
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes `run` possible; the model is as before at the end."""
        with untouched(self.model), evaluating(self.model), torch.no_grad():
            devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
            with compiled_aside(self.model, self._backend, dynamic=False) as step:
                self._step, self._devices = step, devices
                yield

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], look: Look) -> Any:
        """The output under ``look``; every run draws the same random numbers."""
        self._look = look
        with torch.random.fork_rng(devices=self._devices):
            return self._step(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = quantize_graph(gm, example_inputs)
        nodes = [node for node in execution_order(captured) if node.target in fake_quantize.FAKE_QUANTIZE]
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        sites = [_graph_site(node, placeholders) for node in nodes]
        uses = _uses(captured, nodes)
        compiled = aot_eager(captured, example_inputs, lambda graph: _Switched(graph, self).run)

        def run(*given: Any) -> Any:
            inputs = set(map(id, given))
            self._keys = [self._resolve(site, given, inputs) for site in sites]
            if self.uses is not None:
                self.uses += [
                    Use(kind, macs, {name: () if index is None else self._keys[index] for name, index in reads.items()})
                    for kind, macs, reads in uses
                ]
            return compiled(*given)

        return run

    def _resolve(self, site: _GraphSite, given: Sequence[Any], inputs: set[int]) -> tuple[str, ...]:
        """The plan's keys: a graph that instances of a class share knows its sites from its own frame down only."""
        found = [self._by_state.get(id(given[site.state]))] if site.state is not None else []
        for label in site.labels[len(found) :]:
            fits = [k for k in self._evidence if k == label or k.endswith(f".{label}")]
            # Of two that fit, the longer lies in a module of the same frame further down.
            found.append(min((k for k in fits if self._evidence[k] & inputs), key=len, default=None))
        return tuple(dict.fromkeys(key for key in found if key is not None))

    def value(self, index: int, x: Tensor, quantized: Callable[[], Tensor]) -> Tensor:
        """What goes on from one fake-quant node."""
        keys = self._keys[index]
        return self._look(keys, x, quantized) if keys else quantized()


def _graph_site(node: fx.Node, placeholders: list[fx.Node]) -> _GraphSite:
    site = node.meta["site"]
    state = placeholders.index(site.state[0]) if site.state and site.state[0] in placeholders else None
    return _GraphSite((site.label, *node.meta.get("stands_for", ())), state)


class _Switched(fx.Interpreter):
    """Interprets an AOT graph; its fake-quant nodes stand in the order of the captured graph's."""

    def __init__(self, gm: fx.GraphModule, bench: Bench) -> None:
        super().__init__(gm)
        nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in fake_quantize.FAKE_QUANTIZE]
        self.index = {node: i for i, node in enumerate(nodes)}
        self.bench = bench

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.index:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        run = super().run_node
        return self.bench.value(self.index[n], args[0], lambda: run(n))


def _uses(gm: fx.GraphModule, nodes: list[fx.Node]) -> list[tuple[str, int, dict[str, int | None]]]:
    """(kind, multiply-adds, operand → index of the fake-quant node it reads) of every operator."""
    index = {node: i for i, node in enumerate(nodes)}
    found = []
    for node in execution_order(gm):
        kind = kind_of(node)
        if kind is not None:
            reads = {name: index.get(unmoved(operand, passes_values)) for name, operand in operands(node).items()}
            if kind.name == "sdpa":  # two products, of which the second reads probabilities
                first, second = attention_flops(node)
                value = reads.pop("value", None)
                found.append((kind.name, first // 2, reads))
                reads = {"probabilities": None, "value": value}
                found.append((kind.name, second // 2, reads))
            else:
                found.append((kind.name, flops(node) // 2, reads))
    return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the model. It differs from all sites off (``rest_on``: all on) at ``keys`` only."""

    look: Look
    keys: frozenset[str]
    rest_on: bool = False


@dataclass
class Sweep(Generic[Name]):
    """Costs of the settings over all batches; what they sum up to is additive, `effect` makes it readable.

    Attributes:
        every: the cost of all sites on.
        noise: site → sums of squares of its tensor and of its error, for the sites that ran.
        uses: operators of every batch.
        total: what costs are a share of: the squared norm of the float outputs, or the batches.
    """

    measure: str
    costs: dict[Name, float]
    every: float = 0.0
    noise: dict[str, tuple[float, float]] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
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
    uses: list[Use] | None = None,
) -> Sweep[Name]:
    """Measures a prepared model under every setting on every batch; the model is as before at the end.

    ``uses`` becomes the sweep's: looks of the settings may read there which operators the batch in hand ran.
    """
    bench = Bench(model)
    found: Sweep[Name] = Sweep("output error" if loss is None else "loss", dict.fromkeys(settings, 0.0))
    found.uses = [] if uses is None else uses
    unset = {key for key, q in quantizers(model) if q.enabled and q.stateful and math.isnan(q.min_val.item())}
    with bench.opened():
        runs: Iterable[int] = _runs(bench, data, loss, settings, found, (caller, unset))
        if isinstance(data, Sized):
            runs = _Counted(runs, len(data) * (len(settings) + 1))
        for _ in track(runs, "measuring", show=progress):
            pass
    if not found.total and not found.noise:
        raise InvalidArgument("data must hold at least one batch: got none.")
    if not found.noise:
        raise InvalidArgument(
            f"{caller} must be given data that runs a quantized site: got none that ran. "
            "fxquant.explain(model) shows the state of every site."
        )
    return found


class _Counted:
    """Runs whose number a progress bar can know."""

    def __init__(self, runs: Iterable[int], count: int) -> None:
        self.runs, self.count = runs, count

    def __iter__(self) -> Iterator[int]:
        return iter(self.runs)

    def __len__(self) -> int:
        return self.count


def _runs(
    bench: Bench,
    data: Iterable[Any],
    loss: Loss | None,
    settings: Mapping[Name, Setting],
    found: Sweep[Name],
    need: tuple[str, set[str]],
) -> Iterator[int]:
    """Does the runs, one or more before each item."""
    caller, unset = need
    for batch in data:
        (args, kwargs), target = parts(batch, loss)
        seen: set[str] = set()
        reference = bench.run(args, kwargs, _noting(seen))
        if seen & unset:
            names = ", ".join(sorted(seen & unset)[:4])
            raise RangeNotSet(
                f"{caller} must be given a model whose ranges are set: got none for {names}. "
                "Run fxquant.calibrate(model, data) first."
            )
        meter = _LossMeter(loss, reference, target) if loss is not None else _ErrorMeter(reference)
        found.total += meter.total
        found.loss_sum += meter.float_loss
        bench.uses = found.uses
        every = meter.cost(bench.run(args, kwargs, _measuring(found.noise)))
        bench.uses = None
        found.every += every
        yield 1
        for name, setting in settings.items():
            if setting.keys.isdisjoint(seen):  # equal to its baseline, which has run
                found.costs[name] += every if setting.rest_on else 0.0
            else:
                found.costs[name] += meter.cost(bench.run(args, kwargs, setting.look))
            yield 1


def _noting(seen: set[str]) -> Look:
    def look(keys: tuple[str, ...], x: Tensor, quantized: Callable[[], Tensor]) -> Tensor:
        seen.update(keys)
        return x

    return look


def _measuring(noise: dict[str, tuple[float, float]]) -> Look:
    def look(keys: tuple[str, ...], x: Tensor, quantized: Callable[[], Tensor]) -> Tensor:
        y, signal = quantized(), x.double()
        sums = float(signal.square().sum()), float((y.double() - signal).square().sum())
        for key in keys:
            before = noise.get(key, (0.0, 0.0))
            noise[key] = before[0] + sums[0], before[1] + sums[1]
        return y

    return look


def parts(batch: Any, loss: Loss | None) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """Arguments and target of one batch; InvalidArgument where a loss is given and the batch is no pair."""
    if loss is None:
        return batch_arguments(batch), None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InvalidArgument(
            f"each batch of data must be a pair (arguments, target) where a loss is given: "
            f"got {type(batch).__name__}{size}."
        )
    return batch_arguments(batch[0]), batch[1]


class _ErrorMeter:
    """Squared distance from the float outputs of one batch, where those are finite."""

    float_loss = 0.0

    def __init__(self, reference: Any) -> None:
        self.reference = _floats(reference)
        if not self.reference:
            raise InvalidArgument(
                "model must return a floating-point tensor where no loss is given: got "
                f"{type(reference).__name__} without one. Pass loss=."
            )
        finite = [y.isfinite() for y in self.reference]
        self.finite = [None if f.all() else f for f in finite]
        self.total = sum(map(_square_sum, self.reference, self.finite))

    def cost(self, output: Any) -> float:
        """``Σ (y − y₀)²``; NaN counts as infinite."""
        pairs = zip(_floats(output), self.reference, self.finite, strict=True)
        found = sum(_square_sum(_wide(y) - _wide(y0), f) for y, y0, f in pairs)
        return math.inf if math.isnan(found) else found


def _square_sum(x: Tensor, where: Tensor | None) -> float:
    """Summed in float64, but not copied to it: the logits of a language model are large."""
    return float((_wide(x) if where is None else _wide(x)[where]).square().sum(dtype=torch.float64))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LossMeter:
    """Increase of the loss over the float run of one batch."""

    total = 1.0

    def __init__(self, loss: Loss, reference: Any, target: Any) -> None:
        self.loss, self.target = loss, target
        self.float_loss = self._number(reference)
        if not math.isfinite(self.float_loss):
            raise InvalidArgument(f"loss must be finite for the float model: got {self.float_loss}.")

    def cost(self, output: Any) -> float:
        """``loss(y) − loss(y₀)``; NaN counts as infinite."""
        found = self._number(output) - self.float_loss
        return math.inf if math.isnan(found) else found

    def _number(self, output: Any) -> float:
        value = self.loss(output, self.target)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidArgument(f"loss must give one number: got a tensor of shape {tuple(value.shape)}.")
        return float(value)


def _floats(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)  # private; tried on 2.13 and 2.15
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
