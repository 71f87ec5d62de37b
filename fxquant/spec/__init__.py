"""What a user may ask for: formats, ranges, rules, recipes; plain data."""

from fxquant.numerics.division import ROUNDINGS, Rounding
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import RANGES, CurrentTensor, Fixed, Learned, MovingAverage, Range, get_range
from fxquant.spec.recipes import RECIPES, Recipe, get_recipe
from fxquant.spec.rules import Rule, first_layer, last_layer, skip

__all__ = [
    "RANGES",
    "RECIPES",
    "ROUNDINGS",
    "CurrentTensor",
    "Fixed",
    "Learned",
    "Mode",
    "MovingAverage",
    "QuantSpec",
    "Range",
    "Recipe",
    "Rounding",
    "Rule",
    "first_layer",
    "get_range",
    "get_recipe",
    "last_layer",
    "skip",
]
