"""One graph and what is asked of it: what the steps of the solver look up."""

from __future__ import annotations

from torch import fx

from fxquant.graph.dependence import changed_in_place, constant_nodes, same_views, weight_computations
from fxquant.graph.kinds import Kind, operands, unit_end
from fxquant.graph.lift import Operand
from fxquant.graph.nodes import is_float
from fxquant.plan.exceptions import Exceptions
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.recipes import Recipe
from fxquant.targets.profiles import Profile


class Problem:
    """The graph, read once, with the recipe, the target's profile and the rules that decide about it.

    Attributes:
        constants: what depends on parameters, buffers and constants alone.
        computing: constants that only weights are computed from.
        changed: tensors that are changed in place while they are in use.
        view: constant → the first node that holds the same view of the same tensor.
        slow: products that stay in float because they are faster so, with the reason.
    """

    def __init__(self, graph: fx.Graph, recipe: Recipe, profile: Profile, exceptions: Exceptions) -> None:
        self.graph, self.recipe, self.profile, self.exceptions = graph, recipe, profile, exceptions
        self.constants = constant_nodes(graph)
        self.changed = changed_in_place(graph)
        self.computing = weight_computations(graph, self.constants)
        self.view = same_views(graph, self.constants)
        self.slow: dict[fx.Node, str] = {}

    @property
    def weights_only(self) -> str:
        """The reason for activations in float."""
        return f"recipe {self.recipe.name!r} leaves activations in float"

    def end(self, node: fx.Node) -> fx.Node:
        """Last node of the unit that an operator heads."""
        return unit_end(node, self.profile.fuses)

    def is_wanted(self, node: fx.Node, name: str) -> bool:
        """Whether recipe or rules have a format for an activation."""
        if self.recipe.activation is not None:
            return True
        rule = self.exceptions.rule(node, name)
        return rule is not None and rule.spec is not None

    def all_wanted(self, node: fx.Node) -> bool:
        """Whether they have one for all that an operator reads and makes."""
        return all(self.is_wanted(node, name) for name in (*operands(node), "output"))

    def is_weight(self, kind: Kind, name: str, operand: fx.Node) -> bool:
        """Whether an operand is quantized as a weight."""
        return operand in self.constants and is_float(operand) and (kind.is_weight(name) or kind.name == "einsum")

    def weight_spec(self, edge: Operand) -> QuantSpec | None:
        """The format that a weight would get."""
        rule = self.exceptions.rule(*edge)
        return self.recipe.weight if rule is None else rule.spec

    def is_grouped(self, edge: Operand) -> bool:
        """Whether that is a format per group."""
        spec = self.weight_spec(edge)
        return spec is not None and spec.group_size is not None

    def has_float_scales(self, edge: Operand) -> bool:
        """Whether its groups have float32 scales, which no kernel multiplies codes of activations by."""
        spec = self.weight_spec(edge)
        return spec is not None and spec.group_size is not None and spec.scale_format is None

    def activation_spec(self, edge: Operand) -> QuantSpec | None:
        """The format that an activation would get, before it is fitted to the target."""
        rule = self.exceptions.rule(*edge)
        return self.recipe.activation if rule is None else rule.spec

    def is_blocked(self, edge: Operand) -> bool:
        """Whether that is a format per token or group."""
        spec = self.activation_spec(edge)
        return spec is not None and spec.group_size is not None


def names(edges: list[Operand]) -> str:
    """The operators of some operands, as reasons name them."""
    return ", ".join(dict.fromkeys(node.name for node, _ in edges))
