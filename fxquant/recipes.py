"""Named recipes: which format activations and weights get."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fxquant.errors import InvalidArgument
from fxquant.spec import CurrentTensor, QuantSpec, Range


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats for a whole model.

    ``weight.axis`` 0 stands for "per output channel": placement sets the axis of each operator.
    ``kinds`` restricts quantization to some op kinds (None: all that the target supports); a kind that matches
    nothing in the model is an error at prepare.
    """

    name: str
    activation: QuantSpec = field(default_factory=lambda: QuantSpec(signed=False, symmetric=False))
    weight: QuantSpec = field(default_factory=lambda: QuantSpec(narrow=True, axis=0, range=CurrentTensor()))
    kinds: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight.range, CurrentTensor):
            raise InvalidArgument(
                f"Recipe.weight.range must be CurrentTensor: got {self.weight.range}. A weight needs no history."
            )
        if not (self.weight.signed and self.weight.symmetric):
            raise InvalidArgument(
                f"Recipe.weight must be signed and symmetric: got {self.weight}. Runtimes take zero point 0 there."
            )
        if self.weight.axis not in (None, 0):
            raise InvalidArgument(
                f"Recipe.weight.axis must be 0 (per output channel) or None: got {self.weight.axis}. "
                "Placement finds each operator's own axis."
            )
        if self.activation.axis is not None:
            raise InvalidArgument(
                f"Recipe.activation.axis must be None: got {self.activation.axis}. An activation has one scale."
            )

    def with_range(self, found: Range) -> Recipe:
        """The same recipe with another way to find activation ranges."""
        return dataclasses.replace(self, activation=dataclasses.replace(self.activation, range=found))


INT8 = Recipe(name="int8")
W4A8 = Recipe(name="w4a8", weight=QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor()))

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (INT8, W4A8)}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name, or the recipe itself; InvalidArgument names the known ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        known = ", ".join(repr(name) for name in RECIPES)
        raise InvalidArgument(f"recipe must be a Recipe or one of {known}: got {recipe!r}.")
    return RECIPES[recipe]
