"""The solver: which tensors of an ATen training graph are quantized for a target.

1. Every hard operator (conv, linear, matmul …) demands quantized operands (`fxquant.plan.demands`).
2. Soft operators (add, concat, average pool) demand them if all that they touch is quantized anyway.
3. Demands walk up through ops that only move values and merge on the tensor they read (`fxquant.plan.settling`).
4. Units whose integer kernel needs a quantized result get one where step 3 left none (`fxquant.plan.placements`).

With a table of costs, the operators of step 1 that are faster in float leave before step 2 (`fxquant.plan.paying`).
"""

from __future__ import annotations

from torch import fx

from fxquant.graph.kinds import operands
from fxquant.plan.demands import Demands
from fxquant.plan.exceptions import Exceptions
from fxquant.plan.paying import Prices, slow_as_integers
from fxquant.plan.placements import Placements, Placing
from fxquant.plan.problem import Problem
from fxquant.plan.settling import Settling
from fxquant.spec.recipes import Recipe
from fxquant.spec.rules import Rulebook
from fxquant.targets.profiles import Profile

__all__ = ["Placements", "place"]


def place(
    graph: fx.Graph,
    recipe: Recipe,
    profile: Profile,
    exceptions: Exceptions | None = None,
    prices: Prices | None = None,
) -> Placements:
    """Decides the quantized tensors of one graph; deterministic, changes nothing but the rulebook's notes."""
    none = Exceptions(Rulebook(()), lambda node: (("", None),), (None, None))
    problem = Problem(graph, recipe, profile, exceptions or none)
    demands = Demands(problem)
    if prices is not None:
        wanted = dict.fromkeys(node for node, _ in demands.activations)
        problem.slow = slow_as_integers(problem, prices, wanted, [node for node in wanted if _is_free(problem, node)])
        demands = Demands(problem)
    settled = Settling(problem, demands)
    placing = Placing(problem)
    placed = placing.weights(demands.weights) + placing.outputs(settled.units) + placing.activations(settled)
    order = {node: index for index, node in enumerate(graph.nodes)}
    placed.sort(key=lambda p: (order[p.edges[0][0]], ("activation", "weight", "output").index(p.role)))
    return Placements(placed, demands.declined + settled.declined + placing.declined)


def _is_free(problem: Problem, node: fx.Node) -> bool:
    """Whether no rule of the user's says how an operator is quantized; a recipe's own are optional."""
    rules = (problem.exceptions.rule(node, name) for name in (*operands(node), "output"))
    return all(rule is None or rule.optional for rule in rules)
