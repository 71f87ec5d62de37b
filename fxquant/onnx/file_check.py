"""The file that an export wrote held to the evaluated graph on the example inputs, before it takes its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import ExportError
from fxquant.graph.edit import mutates
from fxquant.graph.nodes import results
from fxquant.graph.steps import is_random, is_step
from fxquant.graph.views import FakeQuant
from fxquant.onnx.feeds import arrays
from fxquant.targets.evaluation import Evaluated, evaluate

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

    Attributes:
        evaluated: the graph before the passes of export.
        given, wide: arguments and keywords for the file, and for the graph, which has no half types.
        labels: fake-quant node in it → its QuantizeLinear's result in the file.
        notes: what could not be held against each other, and why.
    """

    evaluated: fx.GraphModule
    given: Inputs
    wide: Inputs
    labels: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def __call__(self, path: Path) -> None:
        """Checks the file at ``path``."""
        try:
            found = evaluate(path, arrays(self.given), set(self.labels.values()))
            held = _Held(self.evaluated, self.labels, found)
            leaves = torch.utils._pytree.tree_leaves(self.wide)
            with torch.no_grad():
                held.run(*(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        except Exception as error:  # whatever a runtime or an operator has to say
            reason = next(iter(str(error).splitlines()), "")
            self.notes.append(f"not checked against the evaluated graph: {type(error).__name__}: {reason}")
        else:
            self.notes += held.verdict()


@dataclass(frozen=True, kw_only=True)
class _Off:
    """A tensor of the file that is not the graph's; ``stepped``: an operator that takes a step is before it."""

    name: str
    values: int
    total: int
    distance: float
    stepped: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.values} of {self.total} values are off, by {self.distance:.4g} at most"


class _Held(fx.Interpreter):
    """Runs the graph on the file's tensors: each quantized one is compared, and goes on as the file has it."""

    def __init__(self, gm: fx.GraphModule, labels: Mapping[str, str], found: Evaluated) -> None:
        super().__init__(gm)
        self.labels, self.found = labels, found
        self.off: list[_Off] = []
        self.random, self.stepped = _after(gm.graph, is_random), _after(gm.graph, is_step)
        self.is_writing = any(map(mutates, gm.graph.nodes))
        self.own: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own tensors, of which a graph that writes gets copies."""
        value = super().get_attr(target, args, kwargs)
        if not (self.is_writing and isinstance(value, Tensor)):
            return value
        return self.own.setdefault(target, value.detach().clone())

    def run_node(self, n: fx.Node) -> Any:
        """A node's value; of a quantizer, the file's."""
        value = super().run_node(n)
        if n.op == "output":
            self._compare_outputs(value)
        view, label = FakeQuant.of(n), self.labels.get(n.name, "")
        if view is None or label not in self.found.pairs:
            return value
        read, given = (torch.from_numpy(array).to(value) for array in self.found.pairs[label])
        scale, zero_point = (torch.as_tensor(self._value(known)).to(value) for known in (view.scale, view.zero_point))
        ends = [(limit - zero_point) * scale for limit in (view.quant_min, view.quant_max)]
        source = self.env[view.input]
        self._compare(label, n, read.clamp(*ends), source.clamp(*ends), 0.5 * scale.item())
        self._compare(label, n, given, self._quantized(view, read), 1.5 * scale.item())
        return torch.empty_like(value).copy_(given)  # in its strides, which views rely on

    def verdict(self) -> list[str]:
        """Notes; raises ExportError where a tensor is off that no step excuses."""
        for off in self.off:
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
            self._compare(name, node, torch.from_numpy(array), value, _spread(value) / 510)

    def _compare(self, name: str, node: fx.Node, theirs: Tensor, ours: Tensor, step: float) -> None:
        """Notes a tensor that is off by more than ``step`` and noise."""
        if node in self.random:
            return
        values, distance = _differing(theirs.to(ours.device), ours, step)
        if values:
            stepped = node in self.stepped
            off = _Off(name=name, values=values, total=ours.numel(), distance=distance, stepped=stepped)
            self.off.append(off)


def _differing(theirs: Tensor, ours: Tensor, step: float) -> tuple[int, float]:
    """How many values are off by more than ``step`` and noise, and the largest distance."""
    if theirs.shape != ours.shape:
        return ours.numel(), math.nan
    one, two = ours.double(), theirs.double()
    last_places = [_LAST_PLACES * torch.finfo(v.dtype).eps for v in (ours, theirs) if v.is_floating_point()]
    noise = max(_NOISE, *last_places) if last_places else 0.0
    largest = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 0.0
    distance = (one - two).abs()
    alike = (distance <= step + noise * largest) | (one == two) | (one.isnan() & two.isnan())
    return int((~alike).sum()), float(distance[~alike].max()) if not alike.all() else 0.0


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
