"""From settled demands to the tensors that are quantized, each with its format and the reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from torch import fx

from fxquant.errors import InvalidArgument
from fxquant.graph.frames import user_line
from fxquant.graph.kinds import activation_name, kind_of, operands
from fxquant.graph.lift import Operand
from fxquant.graph.moves import ZEROS, unmoved
from fxquant.graph.nodes import packet
from fxquant.graph.signs import is_even, is_positive
from fxquant.plan.plan import FloatPlace, Role
from fxquant.plan.problem import Problem, names
from fxquant.plan.settling import Settling
from fxquant.plan.weight_groups import matrix_of
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import Fixed
from fxquant.spec.recipes import check_spec


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A tensor to quantize: for which operands (role "output": whose result), how and why.

    ``matrix`` and ``shape`` are those of `fxquant.plan.Site`.
    """

    role: Role
    spec: QuantSpec
    edges: tuple[Operand, ...]
    reason: str
    matrix: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None


@dataclass
class Placements:
    """What the solver found, in graph order."""

    placed: list[Placement]
    declined: list[tuple[fx.Node, str]]

    def described_declines(self) -> tuple[FloatPlace, ...]:
        """Declines as plan entries."""
        return tuple(FloatPlace(where=n.name, reason=why, source=user_line(n)) for n, why in self.declined)


class Placing:
    """Makes placements; what it leaves out, and why, is added to ``declined``."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.recipe, self.profile = problem, problem.recipe, problem.profile
        self.declined: list[tuple[fx.Node, str]] = []

    def weights(self, found: dict[fx.Node, dict[Operand, int | None]]) -> list[Placement]:
        """Of the tensors of `Demands.weights`."""
        placed = []
        views = Counter(map(unmoved, found))
        for weight, uses in found.items():
            is_read_twice = views[unmoved(weight)] > 1
            for spec, edges in self._by_spec(weight, list(uses), self.recipe.weight).items():
                placed.append(self._weight(spec, {edge: uses[edge] for edge in edges}, is_read_twice))
        return placed

    def _weight(self, spec: QuantSpec, uses: dict[Operand, int | None], is_read_twice: bool) -> Placement:
        edges = list(uses)
        # One quantizer per tensor: a tied weight is quantized per channel if its uses agree on the channels.
        axes = {axis for axis in uses.values() if axis is not None}
        axis = axes.pop() if len(axes) == 1 and spec.axis is not None else None
        matrices = {matrix_of(*edge) for edge in edges}
        matrix = matrices.pop() if len(matrices) == 1 else None
        if spec.group_size is not None and matrix is not None:
            axis = matrix[0]
        reason = f"weight {'tied between' if len(edges) > 1 else 'of'} {names(edges)}"
        reason += f"; {self.problem.weights_only}" if self.recipe.activation is None else ""
        if is_read_twice:
            reason += "; the tensor is also read transposed, there with channels and codes of its own"
        found = self._placement("weight", dataclasses.replace(spec, axis=axis), edges, reason)
        return dataclasses.replace(found, matrix=matrix, shape=_fixed_shape(*edges[0]))

    def outputs(self, units: dict[fx.Node, fx.Node]) -> list[Placement]:
        """Of the results of `Settling.units`."""
        placed = []
        for end, head in units.items():
            edges, kind = [(head, "output")], kind_of(head)
            assert kind is not None, "a unit's head is an operator that placement knows"
            (spec,) = self._by_spec(end, edges, self._activation_spec(end, edges))
            reason = f"{self.profile.name} runs {kind.name} as integers only with its result quantized"
            placed.append(self._placement("output", spec, edges, reason))
        return placed

    def activations(self, settled: Settling) -> list[Placement]:
        """Of the tensors that the settled demands read, but for those that are results of units."""
        by_source: dict[fx.Node, list[Operand]] = {}
        for edge in settled.demands:
            node, name = edge
            source = operands(node)[name] if self.problem.is_blocked(edge) else settled.lifting.source(edge)
            if packet(source) in ZEROS:  # a first state: where the module runs again, its site comes from there
                self.declined.append((edge[0], f"its operand {source.name} is all zeros, which have no range"))
            else:
                by_source.setdefault(source, []).append(edge)
        return [
            self._placement("activation", spec, edges, f"operand of {names(edges)}")
            for source, reads in by_source.items()
            if source not in settled.units
            for spec, edges in self._by_spec(source, reads, self._activation_spec(source, reads)).items()
        ]

    def _activation_spec(self, source: fx.Node, uses: list[Operand]) -> QuantSpec | None:
        """The recipe's format, None where only rules have one."""
        if self.recipe.activation is None:
            return None
        spec = self._fitted(source, self.recipe.activation, uses)
        if activation_name(source) == "relu6" and not spec.symmetric:
            # The runtime drops the clip only if the codes span exactly its range.
            return dataclasses.replace(spec, range=Fixed(min=0.0, max=6.0))
        return spec

    def _fitted(self, source: fx.Node, spec: QuantSpec, uses: list[Operand]) -> QuantSpec:
        """A format as the target takes it for some uses of a tensor."""
        return self.profile.fit(spec, self._named(uses), is_positive=is_positive(source), is_even=is_even(source))

    def _named(self, edges: list[Operand]) -> set[str]:
        """Operands as profiles name them; a matmul with a weight is a linear."""
        found = set()
        for node, name in edges:
            kind = kind_of(node)
            assert kind is not None, "only operators that placement knows have operands"
            is_linear = kind.name == "matmul" and operands(node)["rhs"] in self.problem.constants
            found.add(f"{'linear' if is_linear else kind.name}.{name}")
        return found

    def _by_spec(
        self, source: fx.Node, edges: list[Operand], default: QuantSpec | None
    ) -> dict[QuantSpec, list[Operand]]:
        """The uses of a tensor by the format that rules, or else the recipe, give them."""
        found: dict[QuantSpec, list[Operand]] = {}
        for edge in edges:
            rule = self.problem.exceptions.rule(*edge)
            spec = default if rule is None or rule.spec is None else rule.spec
            if rule is not None and rule.optional and spec is not None:  # for any model, and any target
                spec = self._fitted(source, spec, [edge])
            assert spec is not None, "an operand without a format is not demanded"
            found.setdefault(spec, []).append(edge)
        return found

    def _placement(self, role: Role, spec: QuantSpec, edges: list[Operand], reason: str) -> Placement:
        rule_of = self.problem.exceptions.rule
        rules = {rule: None for rule in (rule_of(*edge) for edge in edges) if rule is not None}
        for rule in rules:
            check_spec(role, spec, str(rule))
            if role != "weight" and self.profile.fit(spec, self._named(edges), is_positive=True) != spec:
                raise InvalidArgument(
                    f"{rule} must have signed and symmetric codes for target {self.profile.name!r}: got {spec}."
                )
            reason += f"; format by {rule}"
        subject = " and ".join(map(str, rules)) or f"recipe {self.recipe.name!r}"
        self.profile.check_format(role, spec, subject)
        spec = spec if role == "weight" else self.profile.rounded(spec)
        return Placement(role=role, spec=spec, edges=tuple(edges), reason=reason)


def _fixed_shape(node: fx.Node, name: str) -> tuple[int, ...] | None:
    """The sizes of an operand, where all are numbers."""
    shape = operands(node)[name].meta["val"].shape
    return tuple(map(int, shape)) if all(isinstance(size, int) for size in shape) else None
