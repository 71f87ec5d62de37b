"""What a half type may make of a graph's values: its rounding, measured, and where it has no number for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dependence import constant_nodes
from fxquant.graph.edit import mutates
from fxquant.graph.nodes import results
from fxquant.graph.views import FakeQuant
from fxquant.targets.evaluation import Evaluated


class Copying(fx.Interpreter):
    """Runs a graph that may write into its attributes, on copies of them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.is_writing = any(map(mutates, gm.graph.nodes))
        self.own: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own tensors, of which a graph that writes gets copies."""
        value = super().get_attr(target, args, kwargs)
        if not (self.is_writing and isinstance(value, Tensor)):
            return value
        return self.own.setdefault(target, value.detach().clone())


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """A value of the graph that the half type cannot hold; ``up``: one above its largest, not only below its least."""

    node: fx.Node
    largest: float
    up: bool

    def __str__(self) -> str:
        stack = self.node.meta.get("nn_module_stack") or {}
        path = next((path for path, _ in reversed(stack.values()) if path), "")
        return f"{self.node.name}{f' of {path}' if path else ''}, which reaches {self.largest:.4g}"


class Rounding(Copying):
    """Runs the evaluated graph, each computed value rounded to the digits of a half type, but of any size.

    The distance of what it makes from what float32 does is what that type's rounding comes to in this model. Each
    quantized tensor goes on as the file has it.

    Attributes:
        sources: label → what its quantizer reads.
        outputs: of the graph.
        overflows: values that are beyond the type.
    """

    def __init__(self, gm: fx.GraphModule, labels: Mapping[str, str], found: Evaluated, half: torch.dtype) -> None:
        super().__init__(gm)
        self.labels, self.found, self.half, self.limits = labels, found, half, torch.finfo(half)
        self.fixed = constant_nodes(gm.graph)
        self.sources: dict[str, Tensor] = {}
        self.outputs: dict[fx.Node, Any] = {}
        self.overflows: list[Overflow] = []

    def run_node(self, n: fx.Node) -> Any:
        """A node's value, rounded; of a quantizer, the file's."""
        value = super().run_node(n)
        if n.op == "output":
            self.outputs = dict(zip(results(self.graph), value, strict=True))
        view, label = FakeQuant.of(n), self.labels.get(n.name, "")
        if view is not None and label in self.found.pairs:
            self.sources[label] = self.env[view.input]
            given = torch.from_numpy(self.found.pairs[label][1]).to(value)
            return torch.empty_like(value).copy_(given.reshape(value.shape))
        if n.op != "call_function" or n in self.fixed:
            return value
        return torch.utils._pytree.tree_map(lambda leaf: self._rounded(n, leaf), value)

    def _rounded(self, n: fx.Node, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        beyond = value.isfinite() & (value.abs() > self.limits.max)
        if beyond.any():
            largest = value[beyond].abs().max().item()
            self.overflows.append(Overflow(node=n, largest=largest, up=bool((value[beyond] > 0).any())))
        mantissa, exponent = torch.frexp(value)
        digits = 1.0 / self.limits.eps * 2
        small = torch.ldexp((mantissa * digits).round() / digits, exponent)
        return torch.empty_like(value).copy_(torch.where(value.isfinite(), small, value))
