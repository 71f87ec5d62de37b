"""Soft operators are quantized where all that they touch is: who stays in, found by taking out who cannot."""

from __future__ import annotations

from collections import deque

from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.lift import Operand, lift
from fxquant.graph.moves import passes_values
from fxquant.graph.nodes import is_float
from fxquant.plan.demands import Demands
from fxquant.plan.problem import Problem


class Settling:
    """The soft operators of a graph, settled.

    Attributes:
        demands: the operands to quantize: those of hard operators, and of the soft ones that are left.
        lifting: what lies between these and their tensors.
        units: unit end → head, for units that need a quantized result and do not get it from their users.
        declined: the soft operators that were taken out, and why.
    """

    def __init__(self, problem: Problem, demands: Demands) -> None:
        self.problem, self._heads = problem, demands.heads
        self._soft = dict(demands.soft)  # unit end → soft operator that is still in
        self._taken_in = demands.taken_in
        self._demanding = {node for node, _ in demands.activations}
        self.declined: list[tuple[fx.Node, str]] = []
        edges = demands.activations + [(node, name) for node in self._soft.values() for name in self._read_by(node)]
        self.lifting = lift(edges, lambda node: passes_values(node) and node.all_input_nodes[0] not in problem.changed)
        self._settle()
        self.demands: list[Operand] = [edge for edge in edges if edge in self.lifting.edges]
        joined = {end: node for end, node in self._soft.items() if self._is_joined(node)}
        units = {**self._heads, **joined}
        self.units = {end: head for end, head in units.items() if not self.lifting.covers(end)}

    def _settle(self) -> None:
        """Drops soft operators until each that is left has only quantized neighbours."""
        waiting = deque(self._soft.values())
        while waiting:
            node = waiting.popleft()
            end = self.problem.end(node)
            why = self._why_not(node, end) if end in self._soft else None
            if why is not None:
                self.declined.append((node, why))
                del self._soft[end]
                waiting += self._near(node, end)
                self.lifting.drop(node)

    def _why_not(self, node: fx.Node, end: fx.Node) -> str | None:
        values, kind = operands(node), kind_of(node)
        if any(operand in self.problem.constants for operand in values.values()):
            return "one operand is a parameter or constant"
        if any(not is_float(operand) for operand in values.values()):
            return "one operand holds integers"
        if kind is not None and kind.name == "add":
            if any(operand.meta["val"].shape != node.meta["val"].shape for operand in values.values()):
                return "operands are broadcast"
            if argument(node, "alpha") != 1:
                return "its second operand is scaled by alpha"
        for name in self._read_by(node):
            source = self.lifting.source((node, name))
            if not self._is_quantized(source):
                return f"its operand {source.name} is also used in float"
        return None if self._is_quantized(end) else f"its result {end.name} is used in float"

    def _read_by(self, soft: fx.Node) -> list[str]:
        """The operands that a soft operator reads as codes."""
        return [name for name in operands(soft) if name != self._taken_in.get(soft)]

    def _is_quantized(self, tensor: fx.Node) -> bool:
        """Whether all uses of a tensor want it quantized, or it is worth a quantizer of its own."""
        if self.lifting.covers(tensor) or tensor in self._heads:
            return True
        return tensor in self._soft and self._is_joined(self._soft[tensor])

    def _is_joined(self, soft: fx.Node) -> bool:
        """Whether a soft operator only reads tensors that other operators make, or need, quantized."""
        sources = (self.lifting.source((soft, name)) for name in operands(soft))
        return all(s in self._heads or s in self._soft or self._is_demanded(s) for s in sources)

    def _is_demanded(self, source: fx.Node) -> bool:
        """Whether a hard operator reads the tensor."""
        return any(
            self._is_demanded(user) if user in self.lifting.lifted else user in self._demanding for user in source.users
        )

    def _near(self, node: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Soft operators that make or read a tensor of ``node``: what they see changes when it leaves."""
        tensors = [end]
        for operand in operands(node).values():
            tensors.append(operand)
            while passes_values(tensors[-1]):
                tensors.append(tensors[-1].all_input_nodes[0])
        found = [self._soft[tensor] for tensor in tensors if tensor in self._soft]
        readers = [user for tensor in tensors for user in tensor.users]
        while readers:
            reader = readers.pop()
            if passes_values(reader):
                readers += reader.users
            elif self._soft.get(self.problem.end(reader)) is reader:
                found.append(reader)
        return found
