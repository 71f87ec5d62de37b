"""Which products are faster in float, by a table of costs: a least cut of the graph between integers and floats.

Each product, and each add of two activations, is on one side. A product costs its time on that side; a tensor that is
made on one side and read on the other costs the change of form, once. The cheapest division of a graph is a minimum
cut (networkx, which torch depends on), so it is exact for the times of the table.

    conv(integer) → SiLU(float) → depthwise(float) → SiLU(float) → conv(integer)

is such a division: the depthwise convolution would cost more as integers than the float one, and its neighbours are
float anyway.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxquant.graph.arguments import argument
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import is_float
from fxquant.plan.problem import Problem
from fxquant.targets.costs import CostTable, Line, Size

_INTEGER, _FLOAT = "integer", "float"  # the two ends of the cut
_MARGIN = 1.05  # what float must gain on a layer, or times that are all but equal would decide
_FAMILY = {"conv": "conv", "add": "conv", "linear": "product", "matmul": "product"}


@dataclass(frozen=True, kw_only=True)
class Prices:
    """A table of costs, and how many examples the example inputs hold: it prices one."""

    table: CostTable
    examples: int = 1


def examples_in(inputs: Any) -> int:
    """The first dimension that all tensors of a model's inputs have, scalars aside; 1 where they differ."""
    sizes = {int(leaf.shape[0]) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    return max(1, *sizes) if len(sizes) == 1 else 1


def slow_as_integers(
    problem: Problem, prices: Prices, wanted: Collection[fx.Node], free: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """The products to leave in float, each with the reason.

    Layers that are far from all of the table stay as the recipe says.

    Args:
        wanted: the products that are to be quantized.
        free: those of them that may be float: no rule of the user's names them.
    """
    return _Division(problem, prices, wanted, free).slow()


def size_of(node: fx.Node, batch: int) -> Size | None:
    """A product or add as tables of costs know it, for a batch of one; None for kinds that none has."""
    kind, out = kind_of(node), node.meta["val"]
    shape = [int(n) for n in out.shape]
    if kind is None or not is_float(node) or 0 in shape:
        return None
    if kind.name == "add":
        return Size(op="add", rows=_for_one(shape, batch))
    if kind.name == "conv":
        return _size_of_conv(node, shape, batch)
    if kind.name in ("linear", "matmul") and shape:
        values = operands(node)
        left = values["input" if kind.name == "linear" else "lhs"].meta["val"]
        return Size(
            op=kind.name,
            rows=_for_one(shape[:-1], batch),
            depth=int(left.shape[-1]),
            columns=shape[-1],
        )
    return None


def _size_of_conv(node: fx.Node, shape: list[int], batch: int) -> Size | None:
    weight = operands(node)["weight"].meta["val"]
    groups, inputs = int(argument(node, "groups")), int(weight.shape[1])
    taps = math.prod(int(n) for n in weight.shape[2:])
    if groups > 1 and inputs > 1:
        return None
    op = "depthwise" if groups > 1 else "pointwise" if taps == 1 else "conv"
    stride = argument(node, "stride")
    largest = max(int(n) for n in stride) if isinstance(stride, (list, tuple)) else int(stride)
    has_batch = len(shape) == len(weight.shape)
    rows = _for_one([*shape[:1], *shape[2:]], batch) if has_batch else math.prod(shape[1:])
    return Size(op=op, rows=rows, depth=inputs * taps, columns=int(weight.shape[0]), stride=largest)


def _for_one(shape: Sequence[int], batch: int) -> int:
    """Numbers of one example; a first dimension that is no multiple of the examples is none of theirs."""
    return math.prod(shape) // (batch if shape and shape[0] % batch == 0 else 1)


class _Cut:
    """The network: what stays on the side of the source is integers."""

    def __init__(self) -> None:
        import networkx  # a tenth of a second, for those who ask for it alone

        self.network: Any = networkx.DiGraph()

    def cost(self, integer: Any, plain: Any, cost: float) -> None:
        """Of the first being integers while the second is float.

        In whole nanoseconds: sums of floats leave edges open by a last bit, through which the sides leak.
        """
        before = self.network.get_edge_data(integer, plain, {"capacity": 0})["capacity"]
        self.network.add_edge(integer, plain, capacity=before + (cost if cost == math.inf else round(1000 * cost)))

    def demand(self, integer: Any, other: Any) -> None:
        """The second is integers where the first is."""
        self.cost(integer, other, math.inf)

    def integers(self) -> set[Any]:
        """The side of the source in the cheapest division."""
        import networkx

        _, (found, _) = networkx.minimum_cut(self.network, _INTEGER, _FLOAT)
        return set(found)


class _Division:
    """One graph being divided."""

    def __init__(
        self, problem: Problem, prices: Prices, wanted: Collection[fx.Node], free: Collection[fx.Node]
    ) -> None:
        self.problem, self.wanted, self.free = problem, set(wanted), set(free)
        self.table, self.batch = prices.table, prices.examples
        self.adds = {n for n in problem.graph.nodes if n.op == "call_function" and self._is_soft_add(n)}
        self.ends = {problem.end(node): node for node in (*self.wanted, *self.adds)}
        self.sizes = {node: size_of(node, self.batch) for node in (*self.wanted, *self.adds)}
        self.cut = _Cut()

    def slow(self) -> dict[fx.Node, str]:
        if not self.wanted:
            return {}
        for node in (*self.wanted, *self.adds):
            self._add_layer(node)
        ends: dict[fx.Node, list[fx.Node]] = {end: [] for end in self.ends}
        for tensor, readers in (ends | self._readers()).items():
            self._add_tensor(tensor, readers)
        integers = self.cut.integers()
        return {
            node: self._why(node) for node in self.problem.graph.nodes if node in self.free and node not in integers
        }

    def _is_soft_add(self, node: fx.Node) -> bool:
        kind = kind_of(node)
        if kind is None or kind.name != "add" or "add" not in self.problem.profile.soft:
            return False
        values = operands(node).values()
        same = all(is_float(v) and v.meta["val"].shape == node.meta["val"].shape for v in values)
        return same and not any(v in self.problem.constants for v in values)

    def _add_layer(self, node: fx.Node) -> None:
        size = self.sizes[node]
        cost = None if size is None else self.table.estimate(size)
        if cost is None and node in self.adds:
            return  # it goes with its neighbours
        if cost is None or (node in self.wanted and node not in self.free):
            self.cut.demand(_INTEGER, node)
            return
        self.cut.cost(_INTEGER, node, cost.plain * _MARGIN)
        self.cut.cost(node, _FLOAT, cost.integer)

    def _readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Tensor → the products and adds that read it, moved at most."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.problem.graph.nodes:
            if node in self.wanted or node in self.adds:
                for operand in operands(node).values():
                    if operand not in self.problem.constants and is_float(operand):
                        found.setdefault(_source(operand), []).append(node)
        return found

    def _add_tensor(self, tensor: fx.Node, readers: list[fx.Node]) -> None:
        """What it costs where maker and readers are on different sides; codes and floats are made once each."""
        maker = self.ends.get(tensor)
        family = self._family(maker if maker is not None else readers[0])
        lines = self.table.edges[family]
        numbers = _for_one([int(n) for n in tensor.meta["val"].shape], self.batch)
        gives_codes = maker is not None and (maker in self.adds or self._needs_output(maker))
        codes, floats = ("codes", tensor), ("floats", tensor)
        for reader in readers:
            self.cut.demand(reader, codes)  # codes are made where any reader is integers
        if not gives_codes:
            self.cut.cost(codes, _FLOAT, lines["enter"].at(numbers))
            self._reorder(readers, maker, lines["reorder"], numbers)
            return
        self.cut.cost(codes, maker, lines["to_integer"].at(numbers))
        if self._is_read_outside(tensor, readers):
            self.cut.cost(maker, _FLOAT, lines["leave"].at(numbers))
            self.cut.cost(_INTEGER, maker, lines["reorder"].at(numbers))
        else:
            self.cut.cost(maker, floats, lines["to_float"].at(numbers))
            for reader in readers:
                self.cut.demand(floats, reader)  # floats are made where any reader is float

    def _reorder(self, readers: Iterable[fx.Node], maker: fx.Node | None, line: Line, numbers: int) -> None:
        """Floats of other operators, whose channels a float convolution orders anew."""
        if maker is None:
            for reader in readers:
                self.cut.cost(_INTEGER, reader, line.at(numbers))

    def _family(self, node: fx.Node) -> str:
        kind = kind_of(node)
        return _FAMILY.get("" if kind is None else kind.name, "product")

    def _needs_output(self, node: fx.Node) -> bool:
        kind = kind_of(node)
        return kind is not None and kind.name in self.problem.profile.needs_output

    def _is_read_outside(self, tensor: fx.Node, readers: list[fx.Node]) -> bool:
        """Whether an operator that stays float reads it, or the model gives it away."""
        waiting, known = [tensor], set(readers)
        while waiting:
            for user in waiting.pop().users:
                if user in known:
                    continue
                if not passes_values(user):
                    return True
                waiting.append(user)
        return False

    def _why(self, node: fx.Node) -> str:
        size = self.sizes[node]
        cost = None if size is None else self.table.estimate(size)
        assert size is not None and cost is not None, "else it was demanded"
        of = f", one of {self.batch} examples" if self.batch > 1 else ""
        return (
            f"{self.table} takes longer with it on integers, counting the codes around it: "
            f"by itself {cost.integer:.3g} µs, {cost.plain:.3g} in float ({size}{of})"
        )


def _source(value: fx.Node) -> fx.Node:
    while passes_values(value):
        value = value.all_input_nodes[0]
    return value

