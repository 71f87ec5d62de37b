"""Now `fxquant.spec.recipes`."""

from fxquant.spec.recipes import INT4_WEIGHT_ONLY, INT8, RECIPES, W4A8, Recipe, get_recipe

__all__ = ["INT4_WEIGHT_ONLY", "INT8", "RECIPES", "W4A8", "Recipe", "get_recipe"]
