"""What each operator of a graph wants quantized, looked at for itself."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.graph.bodies import is_transform
from fxquant.graph.kinds import Kind, kind_of, operands
from fxquant.graph.lift import Operand
from fxquant.graph.nodes import call_nodes, gives_floats, is_float
from fxquant.graph.views import BatchNorm
from fxquant.plan.problem import Problem, names
from fxquant.plan.weight_groups import is_one_group, matrix_of, why_not_blocked, why_not_grouped

_HALF = (torch.float16, torch.bfloat16)
_BESIDE = "the runtime multiplies a weight with scales per group by floats"


class Demands:
    """The demands of a graph's operators, in its order.

    Attributes:
        weights: tensor → the operands that it is the weight of → their channel axis.
        activations: operands that must be quantized.
        heads: unit end → the hard operator whose result must be quantized.
        soft: unit end → soft operator, which is to be quantized if its neighbours are.
        taken_in: soft add → its operand that comes out of the convolution which the add fuses into, and is no codes.
        declined: operators that stay in float, with the reason.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.profile = problem, problem.profile
        self.weights: dict[fx.Node, dict[Operand, int | None]] = {}
        self.activations: list[Operand] = []
        self.heads: dict[fx.Node, fx.Node] = {}
        self.soft: dict[fx.Node, fx.Node] = {}
        self.taken_in: dict[fx.Node, str] = {}
        self.declined: list[tuple[fx.Node, str]] = []
        for node in call_nodes(problem.graph):
            if node not in problem.computing:
                self._look_at(node)

    def _look_at(self, node: fx.Node) -> None:
        problem, profile, kind = self.problem, self.profile, kind_of(node)
        if is_transform(node):
            self.declined.append((node, "a torch.func transform (vmap, grad, …) is kept whole: it stays float"))
        if kind is not None and kind.name in profile.refused:
            self.declined.append((node, profile.refused[kind.name]))
            return
        if kind is None or not gives_floats(node):
            return
        if problem.recipe.kinds is not None and kind.name not in problem.recipe.kinds:
            self.declined.append((node, f"recipe {problem.recipe.name!r} leaves {kind.name} out"))
        elif any(operand in problem.changed for operand in operands(node).values()):
            self.declined.append((node, "one operand is changed in place while it is in use"))
        elif profile.fused_half_attention and kind.name == "sdpa" and node.meta["val"].dtype in _HALF:
            self.declined.append((node, profile.fused_half_attention))
        elif node in problem.slow:
            self.declined.append((node, problem.slow[node]))
        elif kind.name in profile.hard:
            whole = self._demand(node, kind) and problem.is_wanted(node, "output")
            if whole and kind.name in profile.needs_output and not self._skips(node, "output"):
                self.heads[problem.end(node)] = node
        elif kind.name in profile.soft | {"add"} and not problem.all_wanted(node):
            self.declined.append((node, problem.weights_only))
        elif kind.name in profile.soft | {"add"} and any(problem.is_blocked((node, name)) for name in operands(node)):
            self.declined.append((node, "a scale per token or group is for matrix products alone"))
        elif kind.name == "add" and profile.skips:
            self._demand_skip(node)
        elif kind.name in profile.soft and not any(self._skips(node, name) for name in (*operands(node), "output")):
            self.soft[problem.end(node)] = node

    def _skips(self, node: fx.Node, name: str) -> bool:
        """Whether a rule leaves the operand in float; says so."""
        rule = self.problem.exceptions.rule(node, name)
        if rule is None or rule.spec is not None:
            return False
        entry = (node, str(rule) if rule.operand is None else f"its {name}: {rule}")
        if entry not in self.declined[-4:]:  # one for all operands that the rule means alike
            self.declined.append(entry)
        return True

    def _demand(self, node: fx.Node, kind: Kind) -> bool:
        """Demands the operands of a hard operator; whether all of them are quantized."""
        problem = self.problem
        weights = [name for name, operand in operands(node).items() if problem.is_weight(kind, name, operand)]
        ungrouped = next(filter(None, (self._why_not_grouped(node, name) for name in weights)), None)
        if ungrouped is not None:  # its other operands would be quantized for nothing
            self.declined.append((node, ungrouped))
            return False
        floats = [name for name, operand in operands(node).items() if is_float(operand)]
        others = [name for name in floats if name not in weights]
        unblocked = next(filter(None, (self._why_not_blocked(node, name, bool(weights)) for name in others)), None)
        if unblocked is not None:
            self.declined.append((node, unblocked))
            return False
        apart = self._why_not_together(node, weights, others)
        if apart is not None:
            self.declined.append((node, apart))
            return False
        if self.profile.float_beside_groups and any(problem.has_float_scales((node, name)) for name in weights):
            beside = [name for name in others if problem.is_wanted(node, name)]
            self.declined += [(node, f"its {name}: {_BESIDE}") for name in beside]
            floats = weights
        whole = all([self._demand_operand(node, kind, name) for name in floats])
        if not weights and not whole and problem.recipe.activation is None:
            self.declined.append((node, problem.weights_only))
        return whole

    def _demand_operand(self, node: fx.Node, kind: Kind, name: str) -> bool:
        """Demands one operand of a hard operator; whether it is quantized."""
        problem, operand = self.problem, operands(node)[name]
        why = self.profile.float_operands.get(f"{kind.name}.{name}")
        if why is not None:
            self.declined.append((node, f"its {name}: {why}"))
        if why is not None or self._skips(node, name):
            return False
        if problem.is_weight(kind, name, operand):
            axis = None if kind.name == "einsum" else self._channel_axis(kind, operand)
            self.weights.setdefault(problem.view[operand], {})[node, name] = axis
        elif problem.is_wanted(node, name):
            self.activations.append((node, name))
        else:
            return False
        return True

    def _channel_axis(self, kind: Kind, weight: fx.Node) -> int | None:
        axis, dim = kind.weight_axis, weight.meta["val"].dim()
        # The only axis of a vector is the one that the operator sums over; columns of a batch of matrices would want
        # a scale for each column of each matrix.
        if axis is None or dim < 2 or (axis < 0 and dim > 2):
            return None
        return axis % dim

    def _why_not_grouped(self, node: fx.Node, name: str) -> str | None:
        """Why the weight of an operator cannot have the format per group that it would get; None if it can."""
        problem, spec = self.problem, self.problem.weight_spec((node, name))
        if spec is None or spec.group_size is None:
            return None
        why = why_not_grouped(node, name, spec)
        if why is None and not problem.profile.lone_groups and is_one_group(node, name, spec):
            return f"its {spec.group_size} values are one group, whose one scale {problem.profile.name} refuses"
        uses = self.weights.get(problem.view[operands(node)[name]], {})
        others = [edge for edge in uses if problem.is_grouped(edge)]
        if why is None and any(matrix_of(*edge) != matrix_of(node, name) for edge in others):
            return f"it is tied to that of {names(others)}, whose channels are its other axis"
        return why

    def _why_not_blocked(self, node: fx.Node, name: str, has_weight: bool) -> str | None:
        """Why an activation cannot have the format per token or group that it would get; None if it can."""
        spec = self.problem.activation_spec((node, name))
        if spec is None or spec.group_size is None:
            return None
        return why_not_blocked(node, name, spec, has_weight)

    def _why_not_together(self, node: fx.Node, weights: list[str], others: list[str]) -> str | None:
        """Why the codes that the operands of an operator would get cannot be multiplied; None if they can."""
        wanted = [name for name in others if self.problem.is_wanted(node, name)]
        specs = {name: self.problem.activation_spec((node, name)) for name in wanted}
        specs |= {name: self.problem.weight_spec((node, name)) for name in weights}
        kinds = {name: spec.element or "integer" for name, spec in specs.items() if spec is not None}
        if not self.profile.one_kind_of_codes or len(set(kinds.values())) < 2:
            return None
        words = " and ".join(f"its {name} has {kind} codes" for name, kind in kinds.items())
        return f"{words}: {self.profile.name} multiplies codes of one kind"

    def _demand_skip(self, node: fx.Node) -> None:
        """Demands the one operand of an add that does not come out of the convolution which the add fuses into."""
        values = operands(node)
        fused = next((name for name, value in values.items() if self._is_fusible(value)), None)
        if fused is None:
            self.declined.append((node, f"{self.profile.name} adds in float where no convolution ends in the add"))
            return
        (other,) = values.keys() - {fused}
        if values[other] in self.problem.constants or not is_float(values[other]):
            self.declined.append((node, f"its operand {values[other].name} is no activation"))
        elif self._skips(node, other):
            return
        elif "add" not in self.profile.soft:
            self.activations.append((node, other))
        elif (spec := self.problem.activation_spec((node, other))) is not None and spec.bits < 8:
            self.declined.append((node, f"a sum with codes of {spec.bits} bits would lose what float keeps"))
        elif not self._skips(node, "output"):
            self.soft[self.problem.end(node)] = node
            self.taken_in[node] = fused

    def _is_fusible(self, value: fx.Node) -> bool:
        """Whether the value comes out of a convolution, alone or through its BatchNorm, and nothing else reads it."""
        norm = BatchNorm.of(value)
        head = value if norm is None else norm.input
        kind = kind_of(head)
        return kind is not None and kind.name in self.profile.skips and len(value.users) == len(head.users) == 1
