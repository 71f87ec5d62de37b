"""Which operators the runs of a model did, how large they were, and through which sites they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from fxquant.graph.bodies import execution_order
from fxquant.graph.flops import attention_flops, flops
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.moves import passes_values, unmoved
from fxquant.probe.visitor import Keys


@dataclass(frozen=True)
class OperatorRun:
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
        """Whether the operator is a product of quantized operands."""
        return self.macs > 0 and all(self.operands.values())


@dataclass(frozen=True)
class _GraphOperator:
    """An operator of a graph; ``reads`` has, by operand, the number of the fake-quant node that it reads, or None."""

    kind: str
    macs: int
    reads: dict[str, int | None]

    def run(self, keys: Keys) -> OperatorRun:
        """The operator in a run in which the fake-quant nodes have these keys."""
        read = {name: () if number is None else keys[number] for name, number in self.reads.items()}
        return OperatorRun(self.kind, self.macs, read)


class OperatorLog:
    """Collects the runs of operators in ``runs`` while it is ``open``."""

    def __init__(self, runs: list[OperatorRun]) -> None:
        self.runs = runs
        self.open = False

    def watch(self, gm: fx.GraphModule, fake_quants: Sequence[fx.Node]) -> Callable[[Keys], None]:
        """What `fxquant.probe.visitor.visiting` tells of each graph."""
        graph_operators = list(_operators(gm, fake_quants))

        def ran(keys: Keys) -> None:
            if self.open:
                self.runs += [one.run(keys) for one in graph_operators]

        return ran


def _operators(gm: fx.GraphModule, fake_quants: Sequence[fx.Node]) -> list[_GraphOperator]:
    numbers = {node: number for number, node in enumerate(fake_quants)}
    graph_operators = []
    for node in execution_order(gm):
        kind = kind_of(node)
        if kind is None:
            continue
        reads = {name: numbers.get(unmoved(operand, passes_values)) for name, operand in operands(node).items()}
        if kind.name == "sdpa":  # two products, of which the second reads probabilities
            first, second = attention_flops(node)
            values = {"probabilities": None, "value": reads.pop("value", None)}
            graph_operators.append(_GraphOperator(kind.name, first // 2, reads))
            graph_operators.append(_GraphOperator(kind.name, second // 2, values))
        else:
            graph_operators.append(_GraphOperator(kind.name, flops(node) // 2, reads))
    return graph_operators
