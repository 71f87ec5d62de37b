"""The file that an export wrote held to the evaluated graph on the example inputs, before it takes its place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import ExportError, InvalidArgument, MissingDependency
from fxquant.graph.nodes import results
from fxquant.graph.steps import is_random, is_step
from fxquant.graph.views import FakeQuant
from fxquant.numerics import per_channel_view
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.onnx.feeds import arrays
from fxquant.onnx.rounding import Copying, Overflow, Rounding
from fxquant.targets.evaluation import Evaluated, evaluate
from fxquant.targets.session import runs_as_written, session

# What sums in another order and other libraries' functions may make of a value, as a part of the tensor's largest; of
# half types, in last places.
_NOISE = 1e-4
_LAST_PLACES = 8


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class FileCheck:
    """Runs a file and a graph, and raises ExportError with the first tensor of the file that is off.

    Each tensor that the file quantizes is computed from the file's tensors before it, so that what is off is named
    where it arises. What follows an operator that takes a step (a comparison, a choice of the largest) may differ for
    a last bit, and is a note; what follows random numbers is not looked at. The graph's attributes are never written.

    A file of a half type may differ by that type's rounding as well: a few last places, or twice what the rounding of
    each result makes of the graph. A tensor beyond the type's largest value is an InvalidArgument that names it, where
    the file is off for it.

    Attributes:
        evaluated: the graph before the passes of export.
        given, wide: arguments and keywords for the file, and for the graph, which has no half types.
        labels: fake-quant node in it → its QuantizeLinear's result in the file.
        half: the type of the file's float parts, None for float32.
        io: the type that its inputs and outputs were given, None for the model's own.
        must_run: the file is for onnxruntime: where that refuses it, it is an error, else a note.
        notes: what could not be held against each other, and why.
        difference: the largest distance of an output of a half file from the graph's in float32, each from its own
            values, as a part of the output's spread; None where it is not known.
    """

    evaluated: fx.GraphModule
    given: Inputs
    wide: Inputs
    labels: Mapping[str, str]
    half: torch.dtype | None = None
    io: torch.dtype | None = None
    must_run: bool = False
    notes: list[str] = field(default_factory=list)
    difference: float | None = None

    def __call__(self, path: Path) -> None:
        """Checks the file at ``path``."""
        try:
            found = evaluate(path, arrays(self.given), set(self.labels.values()))
            if found.too_new:
                self.notes.append(f"{found.too_new}: checked in onnx's own evaluator")
            if self.must_run and not found.too_new and runs_as_written(path):
                with contextlib.suppress(MissingDependency):
                    session(path, optimize=True, threads=1)  # its optimizations may refuse what it runs as written
            rounding = None
            if self.half is not None:
                rounding = Rounding(self.evaluated, self.labels, found, self.half)
                self._run(rounding)
                self.difference = _largest_share(found, self._run(Copying(self.evaluated)))
            held = _Held(self.evaluated, self.labels, found, rounding, self.io)
            self._run(held)
        except Exception as error:  # whatever a runtime or an operator has to say
            reason = next(iter(str(error).splitlines()), "")
            if self.must_run and isinstance(error, ExportError):
                raise ExportError(f"{reason}. export_onnx(…, verify=False) writes the file nevertheless.") from error
            self.notes.append(f"not checked against the evaluated graph: {type(error).__name__}: {reason}")
        else:
            self.notes += held.verdict()

    def _run(self, interpreter: fx.Interpreter) -> Any:
        leaves = [self._given(leaf) for leaf in torch.utils._pytree.tree_leaves(self.wide)]
        with torch.no_grad():
            return interpreter.run(*leaves)

    def _given(self, leaf: Any) -> Any:
        """An input of the graph, rounded as the file's type of it does."""
        if not isinstance(leaf, Tensor):
            return leaf
        known = self.io is not None and leaf.is_floating_point()
        return leaf.detach().to(self.io).to(leaf.dtype) if known else leaf.detach().clone()


@dataclass(frozen=True, kw_only=True)
class _Off:
    """A tensor of the file that is not the graph's; ``stepped``: an operator that takes a step is before it."""

    name: str
    values: int
    total: int
    distance: float
    stepped: bool
    overflow: Overflow | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.values} of {self.total} values are off, by {self.distance:.4g} at most"


class _Held(Copying):
    """Runs the graph on the file's tensors: each quantized one is compared, and goes on as the file has it."""

    def __init__(
        self,
        gm: fx.GraphModule,
        labels: Mapping[str, str],
        found: Evaluated,
        rounding: Rounding | None,
        io: torch.dtype | None,
    ) -> None:
        super().__init__(gm)
        self.labels, self.found, self.rounding = labels, found, rounding
        self.eps = 0.0 if rounding is None else torch.finfo(rounding.half).eps
        self.io_eps = 0.0 if io is None else torch.finfo(io).eps
        self.off: list[_Off] = []
        self.random, self.stepped = _after(gm.graph, is_random), _after(gm.graph, is_step)

    def run_node(self, n: fx.Node) -> Any:
        """A node's value; of a quantizer, the file's."""
        value = super().run_node(n)
        if n.op == "output":
            self._compare_outputs(value)
        view, label = FakeQuant.of(n), self.labels.get(n.name, "")
        if view is None or label not in self.found.pairs:
            return value
        read, given = (torch.from_numpy(array).to(value).reshape(value.shape) for array in self.found.pairs[label])
        scale, zero_point = (self._along(view, known) for known in (view.scale, view.zero_point))
        low, high = (view.quant_min, view.quant_max) if view.element is None else _ends(view.element)
        ends = [(limit - zero_point) * scale for limit in (low, high)]
        source = self.env[view.input]
        rounded = None if self.rounding is None else self.rounding.sources[label].clamp(*ends)
        unit = scale.max().item()
        # What is read is held as closely as where codes are 8-bit integers; what is given may be the next code.
        near = unit if view.element is None else unit * high / 127
        step = unit if view.element is None else unit * _largest_step(view.element)
        self._compare(label, n, read.clamp(*ends), source.clamp(*ends), 0.5 * near, rounded)
        self._compare(label, n, given, self._quantized(view, read), 1.5 * step)
        return torch.empty_like(value).copy_(given)  # in its strides, which views rely on

    def _along(self, view: FakeQuant, known: Any) -> Tensor:
        """A scale or zero point, as it broadcasts against the tensor."""
        value = torch.as_tensor(self._value(known)).to(self.env[view.input])
        return value if view.axis is None else per_channel_view(value, self.env[view.input].dim(), view.axis)

    def verdict(self) -> list[str]:
        """Notes; raises ExportError where a tensor is off that no step excuses."""
        for off in self.off:
            if off.overflow is not None and (not off.stepped or not math.isfinite(off.distance)):
                assert self.rounding is not None
                half = self.rounding.half
                raise InvalidArgument(
                    f"float_dtype must hold every value that the model computes: got {half}, which ends at "
                    f"{torch.finfo(half).max:.4g}, for {off.overflow} on the given inputs. Give float_dtype="
                    f"{'torch.bfloat16 or ' if half == torch.float16 else ''}torch.float32."
                )
            if not off.stepped:
                raise ExportError(
                    f"the file must compute what the evaluated graph does: got another {off}. This is a fault of "
                    "fxquant or of the exporter; export_onnx(…, verify=False) writes the file nevertheless."
                )
        notes = [f"the evaluated graph has another {off}, after a comparison or a choice" for off in self.off[:1]]
        if self.random:
            notes.append("not checked against the evaluated graph: what depends on random numbers")
        return notes

    def _value(self, known: Any) -> Any:
        return self.env[known] if isinstance(known, fx.Node) else known

    def _quantized(self, view: FakeQuant, read: Tensor) -> Tensor:
        node = view.node
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: read if n is view.input else self.env[n])
        assert callable(node.target)
        value: Tensor = node.target(*args, **kwargs)
        return value

    def _compare_outputs(self, values: Sequence[Any]) -> None:
        ours = [(n, v) for n, v in zip(results(self.graph), values, strict=True) if isinstance(v, Tensor)]
        theirs = self.found.outputs
        if len(ours) != len(theirs):
            raise ValueError(f"the file has {len(theirs)} outputs, the graph {len(ours)}")
        for (node, value), (name, array) in zip(ours, theirs.items(), strict=True):
            rounded = None if self.rounding is None else self.rounding.outputs[node]
            self._compare(name, node, torch.from_numpy(array), value, _spread(value) / 510, rounded)

    def _compare(
        self, name: str, node: fx.Node, theirs: Tensor, ours: Tensor, step: float, rounded: Tensor | None = None
    ) -> None:
        """Notes a tensor that is off by more than ``step`` and noise."""
        if node in self.random:
            return
        if rounded is not None and ours.is_floating_point():
            step += 2 * _furthest(rounded, ours)
        eps = self.eps if name in self.found.pairs else max(self.eps, self.io_eps)
        values, distance = _differing(theirs.to(ours.device), ours, step, _LAST_PLACES * eps)
        if values:
            off = _Off(
                name=name,
                values=values,
                total=ours.numel(),
                distance=distance,
                stepped=node in self.stepped,
                overflow=self._overflow(node),
            )
            self.off.append(off)

    def _overflow(self, node: fx.Node) -> Overflow | None:
        """Where a value before the node, since the last quantizers, is beyond the half type: one above, if any is."""
        if self.rounding is None:
            return None
        before, waiting = set[fx.Node](), [node]
        while waiting:
            found = waiting.pop()
            for each in found.all_input_nodes:
                if each not in before and self.labels.get(each.name, "") not in self.found.pairs:
                    before.add(each)
                    waiting.append(each)
        reached = [each for each in self.rounding.overflows if each.node in before or each.node is node]
        return next((each for each in reached if each.up), next(iter(reached), None))


def _ends(element: str) -> tuple[float, float]:
    largest = FLOAT_FORMATS[element].max
    return -largest, largest


def _largest_step(element: str) -> float:
    """The distance of the two largest values of a small float."""
    found = FLOAT_FORMATS[element]
    return 2.0 ** (found.emax - found.mantissa_bits)


def _differing(theirs: Tensor, ours: Tensor, step: float, least: float = 0.0) -> tuple[int, float]:
    """How many values are off by more than ``step`` and noise (``least`` of the largest), and the largest distance."""
    if theirs.shape != ours.shape:
        return ours.numel(), math.nan
    one, two = ours.double(), theirs.double()
    last_places = [_LAST_PLACES * torch.finfo(v.dtype).eps for v in (ours, theirs) if v.is_floating_point()]
    noise = max(_NOISE, least, *last_places) if last_places else 0.0
    largest = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 0.0
    distance = (one - two).abs()
    alike = (distance <= step + noise * largest) | (one == two) | (one.isnan() & two.isnan())
    return int((~alike).sum()), float(distance[~alike].max()) if not alike.all() else 0.0


def _furthest(one: Tensor, two: Tensor) -> float:
    """The largest distance of two tensors, where both are finite."""
    distance = (one.double() - two.double()).abs()
    distance = distance[distance.isfinite()]
    return distance.max().item() if distance.numel() else 0.0


def _largest_share(found: Evaluated, outputs: Sequence[Any]) -> float:
    """The largest distance of the file's float outputs from others, as a part of each one's spread."""
    ours = [value for value in outputs if isinstance(value, Tensor)]
    pairs = [(torch.from_numpy(array), value) for array, value in zip(found.outputs.values(), ours, strict=True)]
    floats = [(theirs, value.cpu()) for theirs, value in pairs if value.is_floating_point() and value.numel()]
    return max((_furthest(theirs, value) / (_spread(value) or 1.0) for theirs, value in floats), default=0.0)


def _spread(value: Tensor) -> float:
    """Greatest less least value, of those that are finite."""
    finite = value[value.isfinite()].double()
    return (finite.max() - finite.min()).item() if finite.numel() else 0.0


def _after(graph: fx.Graph, starts: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes of which ``starts`` is true, and all that is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if starts(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
