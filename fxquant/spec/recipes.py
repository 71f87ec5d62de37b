"""Named recipes: which format activations and weights get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from fxquant.errors import InvalidArgument
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.current_tensor import CurrentTensor
from fxquant.spec.ranges.named import get_range
from fxquant.spec.rules import Rule, checked


def check_spec(role: str, spec: QuantSpec, subject: str) -> None:
    """Raises InvalidArgument for a format that no site of this role can have."""
    if role != "weight":
        if spec.axis is not None:
            raise InvalidArgument(f"{subject}.axis must be None: got {spec.axis}. An activation has one scale.")
        if role not in spec.range.roles:
            raise InvalidArgument(f"{subject}.range must be one for activations: got {spec.range}.")
        return
    if role not in spec.range.roles:
        raise InvalidArgument(
            f"{subject}.range must be CurrentTensor: got {spec.range}. "
            "Set range=fxquant.CurrentTensor(): a weight needs no history."
        )
    if not (spec.signed and spec.symmetric):
        raise InvalidArgument(f"{subject} must be signed and symmetric: got {spec}. Runtimes take zero point 0 there.")
    if subject.startswith("Recipe") and spec.axis not in (None, 0):
        raise InvalidArgument(
            f"{subject}.axis must be 0 (per output channel) or None: got {spec.axis}. "
            "Placement finds each operator's own axis."
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats for a whole model.

    ``weight.axis`` 0 stands for "per output channel": placement sets the axis of each operator.
    ``kinds`` restricts quantization to some op kinds (None: all that the target supports); a kind that matches
    nothing in the model is an error at prepare. ``rules`` are exceptions, see `fxquant.Rule`.
    ``activation`` None leaves activations in float (weight only), but for those that a rule gives a format.
    """

    name: str
    activation: QuantSpec | None = field(default_factory=lambda: QuantSpec(signed=False, symmetric=False))
    weight: QuantSpec = field(default_factory=lambda: QuantSpec(narrow=True, axis=0, range=CurrentTensor()))
    kinds: frozenset[str] | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_spec("weight", self.weight, "Recipe.weight")
        if self.activation is not None:
            check_spec("activation", self.activation, "Recipe.activation")
        checked(self.rules)

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """The same recipe with more rules, which are asked before its own."""
        return dataclasses.replace(self, rules=(*checked(rules), *self.rules))

    def with_range(self, found: str | Range) -> Recipe:
        """The same recipe with another way to find activation ranges; weight-only ones have none.

        ``found`` is a name (``"moving_average"``, ``"delayed"``) or the range itself. Formats that rules give keep
        their own.
        """
        if self.activation is None:
            return self
        return dataclasses.replace(self, activation=dataclasses.replace(self.activation, range=get_range(found)))


INT8 = Recipe(name="int8")
W4A8 = Recipe(name="w4a8", weight=QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor()))

INT4_WEIGHT_ONLY = Recipe(
    name="int4_weight_only",
    activation=None,
    weight=QuantSpec(bits=4, narrow=True, axis=0, group_size=32, range=CurrentTensor()),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (INT8, W4A8, INT4_WEIGHT_ONLY)}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name, or the recipe itself; InvalidArgument names the known ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        known = ", ".join(repr(name) for name in RECIPES)
        raise InvalidArgument(f"recipe must be a Recipe or one of {known}: got {recipe!r}.")
    return RECIPES[recipe]
