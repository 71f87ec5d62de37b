"""The solver: which tensors of an ATen training graph are quantized for a target.

1. Every hard operator (conv, linear, matmul …) demands quantized operands.
2. Soft operators (add, concat, average pool) demand them if all that they touch is quantized anyway.
3. Demands walk up through ops that only move values and merge on the tensor they read.
4. Units whose integer kernel needs a quantized result get one where step 3 left none.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.errors import InvalidArgument
from fxquant.graph.bodies import is_transform
from fxquant.graph.dependence import changed_in_place, constant_nodes, same_views, weight_computations
from fxquant.graph.frames import user_line
from fxquant.graph.kinds import Kind, activation_name, kind_of, operands, unit_end
from fxquant.graph.lift import Lifting, Operand, lift
from fxquant.graph.moves import ZEROS, passes_values, unmoved
from fxquant.graph.nodes import call_nodes, is_float, packet
from fxquant.plan.exceptions import Exceptions
from fxquant.plan.plan import Declined, Role
from fxquant.plan.weight_groups import matrix_of, why_not_grouped
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import Fixed
from fxquant.spec.recipes import Recipe, check_spec
from fxquant.spec.rules import Rulebook
from fxquant.targets.profiles import Profile

# Results without negative values, besides those of ReLUs.
_POSITIVE = frozenset({torch.ops.aten.softmax, torch.ops.aten.sigmoid})


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A tensor to quantize: for which operands (role "output": whose result), how and why.

    ``matrix`` is that of `fxquant.plan.Site`.
    """

    role: Role
    spec: QuantSpec
    edges: tuple[Operand, ...]
    reason: str
    matrix: tuple[int, int] | None = None


@dataclass
class Placements:
    """What the solver found, in graph order."""

    placed: list[Placement]
    declined: list[tuple[fx.Node, str]]

    def described_declines(self) -> tuple[Declined, ...]:
        """Declines as plan entries."""
        return tuple(Declined(where=n.name, reason=why, source=user_line(n)) for n, why in self.declined)


class _Solver:
    def __init__(self, graph: fx.Graph, recipe: Recipe, profile: Profile, exceptions: Exceptions) -> None:
        self.graph, self.recipe, self.profile, self.exceptions = graph, recipe, profile, exceptions
        self.constants = constant_nodes(graph)
        self.weights: dict[fx.Node, dict[Operand, int | None]] = {}  # tensor → its uses → their channel axis
        self.declined: list[tuple[fx.Node, str]] = []
        self.demands: list[Operand] = []
        self._changed = changed_in_place(graph)
        self._computing = weight_computations(graph, self.constants)
        self._view = same_views(graph, self.constants)
        self._heads: dict[fx.Node, fx.Node] = {}  # unit end → hard operator that needs a quantized result
        self._demanding: set[fx.Node] = set()  # hard operators
        self._soft: dict[fx.Node, fx.Node] = {}  # unit end → soft operator that is still in

    def solve(self) -> Placements:
        for node in call_nodes(self.graph):
            kind = kind_of(node)
            if node in self._computing:
                continue
            if is_transform(node):
                self.declined.append((node, "a torch.func transform (vmap, grad, …) is kept whole: it stays float"))
            if kind is not None and kind.name in self.profile.refused:
                self.declined.append((node, self.profile.refused[kind.name]))
                continue
            if kind is None or not is_float(node):
                continue
            if self.recipe.kinds is not None and kind.name not in self.recipe.kinds:
                self.declined.append((node, f"recipe {self.recipe.name!r} leaves {kind.name} out"))
            elif any(operand in self._changed for operand in operands(node).values()):
                self.declined.append((node, "one operand is changed in place while it is in use"))
            elif kind.name in self.profile.hard:
                whole = self._demand(node) and self._is_wanted(node, "output")
                if whole and kind.name in self.profile.needs_output and not self._skips(node, "output"):
                    self._heads[unit_end(node, self.profile.fuses)] = node
            elif kind.name in self.profile.soft | {"add"} and not self._all_wanted(node):
                self.declined.append((node, self._weights_only))
            elif kind.name == "add" and self.profile.skips:
                self._demand_skip(node)
            elif kind.name in self.profile.soft and not self._skips_any(node):
                self._soft[unit_end(node, self.profile.fuses)] = node
        self._demanding = {node for node, _ in self.demands}
        lifting = self._settle()
        units = self._open_units(lifting)
        placed = self._weights() + self._outputs(units) + self._activations(lifting, units)
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        placed.sort(key=lambda p: (order[p.edges[0][0]], ("activation", "weight", "output").index(p.role)))
        return Placements(placed, self.declined)

    def _skips(self, node: fx.Node, name: str) -> bool:
        """Whether a rule leaves the operand in float; says so."""
        rule = self.exceptions.rule(node, name)
        if rule is None or rule.spec is not None:
            return False
        entry = (node, str(rule) if rule.operand is None else f"its {name}: {rule}")
        if entry not in self.declined[-4:]:  # one for all operands that the rule means alike
            self.declined.append(entry)
        return True

    @property
    def _weights_only(self) -> str:
        return f"recipe {self.recipe.name!r} leaves activations in float"

    def _is_wanted(self, node: fx.Node, name: str) -> bool:
        """Whether recipe or rules have a format for an activation."""
        if self.recipe.activation is not None:
            return True
        rule = self.exceptions.rule(node, name)
        return rule is not None and rule.spec is not None

    def _all_wanted(self, node: fx.Node) -> bool:
        return all(self._is_wanted(node, name) for name in (*operands(node), "output"))

    def _is_weight(self, kind: Kind, name: str, operand: fx.Node) -> bool:
        return operand in self.constants and is_float(operand) and (name == kind.weight or kind.name == "einsum")

    def _why_not_grouped(self, node: fx.Node, name: str) -> str | None:
        """Why the weight of an operator cannot have the format per group that it would get; None if it can."""
        rule = self.exceptions.rule(node, name)
        spec = self.recipe.weight if rule is None else rule.spec
        if spec is None or spec.group_size is None:
            return None
        why = why_not_grouped(node, name, spec, self.profile)
        others = [edge for edge in self.weights.get(self._view[operands(node)[name]], {}) if self._is_grouped(edge)]
        if why is None and any(matrix_of(*edge) != matrix_of(node, name) for edge in others):
            return f"it is tied to that of {_names(others)}, whose channels are its other axis"
        return why

    def _is_grouped(self, edge: Operand) -> bool:
        rule = self.exceptions.rule(*edge)
        spec = self.recipe.weight if rule is None else rule.spec
        return spec is not None and spec.group_size is not None

    def _skips_any(self, node: fx.Node) -> bool:
        return any(self._skips(node, name) for name in (*operands(node), "output"))

    def _demand(self, node: fx.Node) -> bool:
        """Demands the operands of a hard operator; whether all of them are quantized."""
        kind = kind_of(node)
        assert kind is not None
        weights = [name for name, operand in operands(node).items() if self._is_weight(kind, name, operand)]
        ungrouped = next(filter(None, (self._why_not_grouped(node, name) for name in weights)), None)
        if ungrouped is not None:  # its other operands would be quantized for nothing
            self.declined.append((node, ungrouped))
            return False
        whole = True
        for name, operand in operands(node).items():
            if not is_float(operand):
                continue
            why = self.profile.float_operands.get(f"{kind.name}.{name}")
            if why is not None:
                self.declined.append((node, f"its {name}: {why}"))
            if why is not None or self._skips(node, name):
                whole = False
                continue
            constant = operand in self.constants
            if constant and name == kind.weight:
                axis, dim = kind.weight_axis, operand.meta["val"].dim()
                # The only axis of a vector is the one that the operator sums over; columns of a batch of matrices
                # would want a scale for each column of each matrix.
                axis = None if axis is None or dim < 2 or (axis < 0 and dim > 2) else axis % dim
                axis = None if kind.name in self.profile.one_scale else axis
                self.weights.setdefault(self._view[operand], {})[node, name] = axis
            elif constant and kind.name == "einsum":
                self.weights.setdefault(self._view[operand], {})[node, name] = None
            elif self._is_wanted(node, name):
                self.demands.append((node, name))
            else:
                whole = False
        if not weights and not whole and self.recipe.activation is None:
            self.declined.append((node, self._weights_only))
        return whole

    def _demand_skip(self, node: fx.Node) -> None:
        """Demands the one operand of an add that does not come out of the convolution which the add fuses into."""
        values = operands(node)
        heads = {name: self._fusible_head(value) for name, value in values.items()}
        fused = next((name for name, head in heads.items() if head), None)
        if fused is None:
            self.declined.append((node, f"{self.profile.name} adds in float where no convolution ends in the add"))
            return
        (other,) = values.keys() - {fused}
        if values[other] in self.constants or not is_float(values[other]):
            self.declined.append((node, f"its operand {values[other].name} is no activation"))
        elif not self._skips(node, other):
            self.demands.append((node, other))

    def _fusible_head(self, value: fx.Node) -> fx.Node | None:
        """The convolution that the value comes out of, alone or through its BatchNorm."""
        head = value.args[0] if packet(value) is torch.ops.aten.batch_norm else value
        kind = kind_of(head) if isinstance(head, fx.Node) else None
        if kind is None or kind.name not in self.profile.skips or len(value.users) != 1:
            return None
        return head if head is value or len(head.users) == 1 else None  # type: ignore[union-attr,return-value]

    def _settle(self) -> Lifting:
        """Drops soft operators until each that is left has only quantized neighbours."""
        edges = self.demands + [(node, name) for node in self._soft.values() for name in operands(node)]
        lifting = lift(edges, lambda node: passes_values(node) and node.all_input_nodes[0] not in self._changed)
        waiting = deque(self._soft.values())
        while waiting:
            node = waiting.popleft()
            end = unit_end(node, self.profile.fuses)
            why = self._why_not(node, lifting) if end in self._soft else None
            if why is not None:
                self.declined.append((node, why))
                del self._soft[end]
                waiting += self._near(node, end)
                lifting.drop(node)
        self.demands = [edge for edge in edges if edge in lifting.edges]
        return lifting

    def _why_not(self, node: fx.Node, lifting: Lifting) -> str | None:
        values = operands(node)
        if any(operand in self.constants for operand in values.values()):
            return "one operand is a parameter or constant"
        if any(not is_float(operand) for operand in values.values()):
            return "one operand holds integers"
        if kind_of(node).name == "add":  # type: ignore[union-attr]
            if any(operand.meta["val"].shape != node.meta["val"].shape for operand in values.values()):
                return "operands are broadcast"
            if node.kwargs.get("alpha", 1) != 1:
                return "its second operand is scaled by alpha"
        for name in values:
            source = lifting.source((node, name))
            if not self._is_quantized(source, lifting):
                return f"its operand {source.name} is also used in float"
        end = unit_end(node, self.profile.fuses)
        return None if self._is_quantized(end, lifting) else f"its result {end.name} is used in float"

    def _is_quantized(self, tensor: fx.Node, lifting: Lifting) -> bool:
        """Whether all uses of a tensor want it quantized, or it is worth a quantizer of its own."""
        if lifting.covers(tensor) or tensor in self._heads:
            return True
        return tensor in self._soft and self._is_joined(self._soft[tensor], lifting)

    def _is_joined(self, soft: fx.Node, lifting: Lifting) -> bool:
        """Whether a soft operator only reads tensors that other operators make, or need, quantized."""
        sources = (lifting.source((soft, name)) for name in operands(soft))
        return all(s in self._heads or s in self._soft or self._is_demanded(s, lifting) for s in sources)

    def _is_demanded(self, source: fx.Node, lifting: Lifting) -> bool:
        """Whether a hard operator reads the tensor."""
        return any(
            self._is_demanded(user, lifting) if user in lifting.lifted else user in self._demanding
            for user in source.users
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
            elif self._soft.get(unit_end(reader, self.profile.fuses)) is reader:
                found.append(reader)
        return found

    def _open_units(self, lifting: Lifting) -> dict[fx.Node, fx.Node]:
        """Unit end → head, for units that need a quantized result and do not get it from their users."""
        joined = {end: node for end, node in self._soft.items() if self._is_joined(node, lifting)}
        return {end: head for end, head in {**self._heads, **joined}.items() if not lifting.covers(end)}

    def _weights(self) -> list[Placement]:
        placed = []
        views = Counter(map(unmoved, self.weights))
        for weight, uses in self.weights.items():
            for spec, edges in self._by_spec(list(uses), self.recipe.weight).items():
                # One quantizer per tensor: a tied weight is quantized per channel if its uses agree on the channels.
                axes = {uses[edge] for edge in edges if uses[edge] is not None}
                axis = axes.pop() if len(axes) == 1 and spec.axis is not None else None
                matrices = {matrix_of(*edge) for edge in edges}
                matrix = matrices.pop() if len(matrices) == 1 else None
                if spec.group_size is not None and matrix is not None:
                    axis = matrix[0]
                reason = f"weight {'tied between' if len(edges) > 1 else 'of'} {_names(edges)}"
                reason += f"; {self._weights_only}" if self.recipe.activation is None else ""
                if views[unmoved(weight)] > 1:
                    reason += "; the tensor is also read transposed, there with channels and codes of its own"
                found = self._placement("weight", dataclasses.replace(spec, axis=axis), edges, reason)
                placed.append(dataclasses.replace(found, matrix=matrix))
        return placed

    def _outputs(self, units: dict[fx.Node, fx.Node]) -> list[Placement]:
        placed = []
        for end, head in units.items():
            edges = [(head, "output")]
            (spec,) = self._by_spec(edges, self._activation_spec(end, edges))
            reason = f"{self.profile.name} runs {kind_of(head).name} as integers only with its result quantized"  # type: ignore[union-attr]
            placed.append(self._placement("output", spec, edges, reason))
        return placed

    def _activations(self, lifting: Lifting, units: dict[fx.Node, fx.Node]) -> list[Placement]:
        by_source: dict[fx.Node, list[Operand]] = {}
        for edge in self.demands:
            source = lifting.source(edge)
            if packet(source) in ZEROS:  # a first state: where the module runs again, its site comes from there
                self.declined.append((edge[0], f"its operand {source.name} is all zeros, which have no range"))
            else:
                by_source.setdefault(source, []).append(edge)
        return [
            self._placement("activation", spec, edges, f"operand of {_names(edges)}")
            for source, reads in by_source.items()
            if source not in units
            for spec, edges in self._by_spec(reads, self._activation_spec(source, reads)).items()
        ]

    def _activation_spec(self, source: fx.Node, uses: list[Operand]) -> QuantSpec | None:
        """The recipe's format, None where only rules have one."""
        if self.recipe.activation is None:
            return None
        is_positive = activation_name(source) is not None or packet(source) in _POSITIVE
        spec = self.profile.fit(self.recipe.activation, self._named(uses), is_positive=is_positive)
        if activation_name(source) == "relu6" and not spec.symmetric:
            # The runtime drops the clip only if the codes span exactly its range.
            return dataclasses.replace(spec, range=Fixed(min=0.0, max=6.0))
        return spec

    def _named(self, edges: list[Operand]) -> set[str]:
        """Operands as profiles name them; a matmul with a weight is a linear."""
        found = set()
        for node, name in edges:
            kind = kind_of(node).name  # type: ignore[union-attr]
            is_linear = kind == "matmul" and operands(node)["rhs"] in self.constants
            found.add(f"{'linear' if is_linear else kind}.{name}")
        return found

    def _by_spec(self, edges: list[Operand], default: QuantSpec | None) -> dict[QuantSpec, list[Operand]]:
        """The uses of a tensor by the format that rules, or else the recipe, give them."""
        found: dict[QuantSpec, list[Operand]] = {}
        for edge in edges:
            rule = self.exceptions.rule(*edge)
            spec = default if rule is None or rule.spec is None else rule.spec
            assert spec is not None, "an operand without a format is not demanded"
            found.setdefault(spec, []).append(edge)
        return found

    def _placement(self, role: Role, spec: QuantSpec, edges: list[Operand], reason: str) -> Placement:
        rules = {rule: None for rule in (self.exceptions.rule(*edge) for edge in edges) if rule is not None}
        for rule in rules:
            check_spec(role, spec, str(rule))
            if role != "weight" and self.profile.fit(spec, self._named(edges), is_positive=True) != spec:
                raise InvalidArgument(
                    f"{rule} must have signed and symmetric codes for target {self.profile.name!r}: got {spec}."
                )
            reason += f"; format by {rule}"
        subject = " and ".join(map(str, rules)) or f"recipe {self.recipe.name!r}"
        self.profile.check_format(role, spec, subject)
        return Placement(role=role, spec=spec, edges=tuple(edges), reason=reason)


def _names(edges: list[Operand]) -> str:
    return ", ".join(dict.fromkeys(node.name for node, _ in edges))


def place(graph: fx.Graph, recipe: Recipe, profile: Profile, exceptions: Exceptions | None = None) -> Placements:
    """Decides the quantized tensors of one graph; deterministic, changes nothing but the rulebook's notes."""
    none = Exceptions(Rulebook(()), lambda node: (("", None),), (None, None))
    return _Solver(graph, recipe, profile, exceptions or none).solve()
