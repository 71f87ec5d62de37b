"""From a parameter to the operand of an operator, through its quantizer: what can be read, and written back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument
from fxquant.graph.moves import CASTS, PARTING, TURNING, aten, moves
from fxquant.graph.nodes import is_float, packet
from fxquant.graph.views import FakeQuant, SymmetricQparams, qparams_of
from fxquant.ptq.bound_graph import BoundGraph

_ONE_TO_ONE = moves("aliases", "copies", "detaches", "reshapes", "ones", "permutes") | TURNING | PARTING


@dataclass(frozen=True, eq=False)
class WeightPath:
    """A weight operand as elements of one parameter: moved, scaled as by a folded BatchNorm, and quantized.

    Attributes:
        graph: where.
        parameter: the placeholder of the parameter.
        path: the operators from it to the operand, each reading the one before.
        quantizer: the fake-quant of a site among them; None for a weight in float.
    """

    graph: BoundGraph
    parameter: fx.Node
    path: tuple[fx.Node, ...]
    quantizer: fx.Node | None

    @classmethod
    def find(cls, graph: BoundGraph, operand: fx.Node) -> WeightPath | str:
        """The path to an operand that depends on parameters alone; the reason where it is none."""
        path: list[fx.Node] = []
        node, quantizer = operand, None
        while node not in graph.state:
            before = _before(graph, node)
            if isinstance(before, str):
                return before
            if node in graph.keys:
                quantizer = node
            path.insert(0, node)
            node = before
        if not isinstance(graph.state[node], torch.nn.Parameter) or not is_float(node):
            return "its weight is no parameter"
        found = cls(graph, node, tuple(path), quantizer)
        if found.depends_on_itself:
            return "its weight is scaled by what is computed from it"
        return found

    @property
    def tensor(self) -> Tensor:
        """The parameter itself."""
        return self.graph.state[self.parameter]

    @property
    def depends_on_itself(self) -> bool:
        """Whether a factor of the weight is computed from the weight, as weight normalization does."""
        return any(_reads(other, self.parameter) for node in self.path if (other := self._factor_of(node)) is not None)

    @property
    def factors(self) -> list[fx.Node]:
        """The constants that the parameter is multiplied by on its way."""
        return [other for node in self.path if (other := self._factor_of(node)) is not None]

    def _factor_of(self, node: fx.Node) -> fx.Node | None:
        return _factor(node) if packet(node) is aten.mul else None

    def _carried(self, value: Tensor, multiply: bool, path: tuple[fx.Node, ...]) -> Tensor:
        """``value``, shaped like what the path reads, moved along it, in float."""
        for node in path:
            if node in self.graph.keys:
                continue
            factor = self._factor_of(node)
            if factor is None:
                value = _moved(node, value)
            elif multiply:
                value = value * self.graph.value(factor)
        return value

    def read(self) -> Tensor:
        """The operand in float, as the parameter is now."""
        return self._carried(self.tensor.detach(), True, self.path)

    @property
    def index(self) -> Tensor:
        """For each element of the operand, the element of the flattened parameter that it is."""
        numbers = torch.arange(self.tensor.numel(), device=self.tensor.device).view(self.tensor.shape)
        return self._carried(numbers, False, self.path)

    def written(self, operand: Tensor) -> Tensor:
        """The parameter that has ``operand`` as its operand; what is not in that, or times 0, stays."""
        flat = self.tensor.detach().reshape(-1).clone()
        index = self.index.reshape(-1)
        factor = self._carried(torch.ones_like(self.tensor), True, self.path).reshape(-1)
        new = operand.reshape(-1).to(factor.dtype) / factor
        flat[index] = torch.where((factor != 0) & new.isfinite(), new.to(flat.dtype), flat[index])
        return flat.view(self.tensor.shape)

    def over_parameter(self, operand: Tensor, rest: int) -> Tensor:
        """Integers of the operand's elements at those of the parameter; ``rest`` where it has others."""
        flat = torch.full((self.tensor.numel(),), rest, dtype=operand.dtype, device=operand.device)
        flat[self.index.reshape(-1)] = operand.reshape(-1)
        return flat.view(self.tensor.shape)

    # Of a quantized weight

    @property
    def grid(self) -> FakeQuant:
        """The quantizer."""
        found = FakeQuant.of(self.quantizer)
        assert found is not None, "asked of quantized weights only"
        return found

    @property
    def is_scaled_by_itself(self) -> bool:
        """Whether the scale is that of the weight in hand, whose largest magnitude is then the highest code."""
        return isinstance(qparams_of(self.grid.scale), SymmetricQparams)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest code that leave such a scale as it is."""
        low, high = self.grid.quant_min, self.grid.quant_max
        return (max(low, -high), high) if self.is_scaled_by_itself else (low, high)

    @property
    def scale(self) -> Tensor:
        """The scales as they are now, one or one for each slice."""
        scale = self.grid.scale
        assert isinstance(scale, fx.Node), "a site's scale is a tensor"
        found: Tensor = self.graph.value(scale)
        return found.reshape(-1)

    @property
    def numbers(self) -> Tensor:
        """For each element of the operand, the number of its scale."""
        assert self.quantizer is not None
        value, axis = self.grid.input.meta["val"], self.grid.axis
        shape = [1] * value.dim()
        if axis is not None:
            shape[axis] = -1
        count = 1 if axis is None else int(value.shape[axis])
        numbers = torch.arange(count, device=self.tensor.device).view(shape).expand(tuple(value.shape))
        after = self.path[self.path.index(self.quantizer) + 1 :]
        return self._carried(numbers, False, after)

    def codes(self) -> Tensor:
        """The operand's codes as they are now, in float."""
        quantized = self._value_of_operand()
        return (quantized / self.scale[self.numbers]).round()

    def _value_of_operand(self) -> Tensor:
        found: Tensor = self.graph.value(self.path[-1])
        return found


def _before(graph: BoundGraph, node: fx.Node) -> fx.Node | str:
    """What a node of a path reads along it."""
    if node in graph.keys:
        grid = FakeQuant.of(node)
        assert grid is not None
        return grid.input
    name = packet(node)
    if name in CASTS:
        return "its weight is cast to another type"
    if name is operator.getitem or (name in _ONE_TO_ONE and len(node.all_input_nodes) == 1):
        return node.all_input_nodes[0]
    if name is aten.mul and _factor(node) is not None:
        return next(value for value in _factors(node) if value is not _factor(node))
    return f"its weight is computed in the model, by {getattr(name, '__name__', name)}"


def _factors(node: fx.Node) -> list[fx.Node]:
    return [value for name in ("self", "other") if isinstance(value := argument(node, name), fx.Node)]


def _factor(node: fx.Node) -> fx.Node | None:
    """Of a product of two constants the one that is repeated over the other; None where there is no telling."""
    values = _factors(node)
    if len(values) != 2:
        return None
    whole = [value.meta["val"].shape == node.meta["val"].shape for value in values]
    return values[1] if whole[0] else values[0] if whole[1] else None


def _reads(node: fx.Node, source: fx.Node) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop()
        if here is source:
            return True
        waiting += [n for n in here.all_input_nodes if n not in seen]
        seen.update(here.all_input_nodes)
    return False


def _moved(node: fx.Node, value: Any) -> Any:
    """A move of another tensor of the same shape."""
    source = node.all_input_nodes[0]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: value if n is source else n)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)
