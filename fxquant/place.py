"""The solver: which tensors of an ATen training graph are quantized for a target.

1. Every hard operator (conv, linear, matmul …) demands quantized operands.
2. Soft operators (add, concat, average pool) demand them if all that they touch is quantized anyway.
3. Demands walk up through ops that only move values and merge on the tensor they read.
4. Units whose integer kernel needs a quantized result get one where step 3 left none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from fxquant.graph import activation_name, call_nodes, constant_nodes, is_float, kind_of, operands, unit_end, user_line
from fxquant.lift import Lifting, Operand, lift, passes_values
from fxquant.plan import Declined, Role
from fxquant.profiles import Profile
from fxquant.recipes import Recipe
from fxquant.spec import Fixed, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A tensor to quantize: for which operands (role "output": whose result), how and why."""

    role: Role
    spec: QuantSpec
    edges: tuple[Operand, ...]
    reason: str


@dataclass
class Placements:
    """What the solver found, in graph order."""

    placed: list[Placement]
    declined: list[tuple[fx.Node, str]]

    def described_declines(self) -> tuple[Declined, ...]:
        """Declines as plan entries."""
        return tuple(Declined(where=n.name, reason=why, source=user_line(n)) for n, why in self.declined)


class _Solver:
    def __init__(self, graph: fx.Graph, recipe: Recipe, profile: Profile) -> None:
        self.graph, self.recipe, self.profile = graph, recipe, profile
        self.constants = constant_nodes(graph)
        self.weights: dict[tuple[fx.Node, int | None], list[Operand]] = {}
        self.declined: list[tuple[fx.Node, str]] = []
        self.demands: list[Operand] = []
        self._heads: list[fx.Node] = []
        self._units: dict[fx.Node, fx.Node] = {}

    def solve(self) -> Placements:
        soft: list[fx.Node] = []
        for node in call_nodes(self.graph):
            kind = kind_of(node)
            if kind is None or not is_float(node):
                continue
            if self.recipe.kinds is not None and kind.name not in self.recipe.kinds:
                self.declined.append((node, f"recipe {self.recipe.name!r} leaves {kind.name} out"))
            elif kind.name in self.profile.refused:
                self.declined.append((node, self.profile.refused[kind.name]))
            elif kind.name in self.profile.hard:
                self._demand(node)
                if kind.name in self.profile.needs_output:
                    self._heads.append(node)
            elif kind.name in self.profile.soft:
                soft.append(node)
        lifting = self._settle(soft)
        placed = self._weights() + self._outputs() + self._activations(lifting)
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        placed.sort(key=lambda p: (order[p.edges[0][0]], ("activation", "weight", "output").index(p.role)))
        return Placements(placed, self.declined)

    def _demand(self, node: fx.Node) -> None:
        kind = kind_of(node)
        assert kind is not None
        for name, operand in operands(node).items():
            if not is_float(operand):
                continue
            constant = operand in self.constants
            if constant and name == kind.weight:
                axis = kind.weight_axis
                if axis is not None:
                    axis %= operand.meta["val"].dim()
                self.weights.setdefault((operand, axis), []).append((node, name))
            elif constant and kind.name == "einsum":
                self.weights.setdefault((operand, None), []).append((node, name))
            else:
                self.demands.append((node, name))

    def _settle(self, soft: list[fx.Node]) -> Lifting:
        """Drops soft operators until each that is left has only quantized neighbours."""
        while True:
            edges = self.demands + [(node, name) for node in soft for name in operands(node)]
            lifting = lift(self.graph, edges, passes_values)
            self._units = self._open_units(lifting, soft)
            kept = []
            for node in soft:
                why = self._why_not(node, lifting)
                if why is None:
                    kept.append(node)
                else:
                    self.declined.append((node, why))
            if len(kept) == len(soft):
                self.demands = edges
                return lifting
            soft = kept

    def _open_units(self, lifting: Lifting, soft: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Unit end → head, for units that need a quantized result and do not get it from their users."""
        fuses = self.profile.fuses
        heads = {unit_end(head, fuses): head for head in self._heads}
        # A soft operator between quantized operands is worth a quantizer of its own behind it.
        anchors = heads.keys() | {unit_end(node, fuses) for node in soft} | {lifting.source(e) for e in self.demands}
        for node in soft:
            if all(lifting.source((node, name)) in anchors for name in operands(node)):
                heads[unit_end(node, fuses)] = node
        return {end: head for end, head in heads.items() if not lifting.covers(end)}

    def _why_not(self, node: fx.Node, lifting: Lifting) -> str | None:
        values = operands(node)
        constant = next((o for o in values.values() if o in self.constants), None)
        if constant is not None:
            return "one operand is a parameter or constant"
        if any(not is_float(o) or o.meta["val"].shape != node.meta["val"].shape for o in values.values()):
            if kind_of(node).name == "add":  # type: ignore[union-attr]
                return "operands are broadcast"
        for name in values:
            source = lifting.source((node, name))
            if not lifting.covers(source) and source not in self._units:
                return f"its operand {source.name} is also used in float"
        end = unit_end(node, self.profile.fuses)
        if lifting.covers(end) or end in self._units:
            return None
        return f"its result {end.name} is used in float"

    def _weights(self) -> list[Placement]:
        placed: dict[fx.Node, Placement] = {}
        for (operand, axis), edges in self.weights.items():
            spec = dataclasses.replace(self.recipe.weight, axis=axis if self.recipe.weight.axis is not None else None)
            known = placed.get(operand)
            if known is None:
                placed[operand] = Placement(
                    role="weight", spec=spec, edges=tuple(edges), reason=f"weight of {_names(edges)}"
                )
                continue
            # One quantizer per tensor: a tied weight keeps the finer scale of the two.
            if known.spec.axis is not None:
                spec = known.spec
            edges = [*known.edges, *edges]
            reason = f"weight tied between {_names(edges)}"
            placed[operand] = Placement(role="weight", spec=spec, edges=tuple(edges), reason=reason)
        return list(placed.values())

    def _outputs(self) -> list[Placement]:
        return [
            Placement(
                role="output",
                spec=self._activation_spec(end),
                edges=((head, "output"),),
                reason=f"{self.profile.name} runs {kind_of(head).name} as integers only with its result quantized",  # type: ignore[union-attr]
            )
            for end, head in self._units.items()
        ]

    def _activations(self, lifting: Lifting) -> list[Placement]:
        by_source: dict[fx.Node, list[Operand]] = {}
        for edge in self.demands:
            by_source.setdefault(lifting.source(edge), []).append(edge)
        return [
            Placement(
                role="activation",
                spec=self._activation_spec(source),
                edges=tuple(edges),
                reason=f"operand of {_names(edges)}",
            )
            for source, edges in by_source.items()
            if source not in self._units
        ]

    def _activation_spec(self, source: fx.Node) -> QuantSpec:
        spec = self.recipe.activation
        if activation_name(source) == "relu6" and not spec.symmetric:
            # The runtime drops the clip only if the codes span exactly its range.
            return dataclasses.replace(spec, range=Fixed(min=0.0, max=6.0))
        return spec


def _names(edges: list[Operand]) -> str:
    return ", ".join(dict.fromkeys(node.name for node, _ in edges))


def place(graph: fx.Graph, recipe: Recipe, profile: Profile) -> Placements:
    """Decides the quantized tensors of one graph; deterministic, changes nothing."""
    return _Solver(graph, recipe, profile).solve()
