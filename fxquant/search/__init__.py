"""Formats by measurement: what each site costs, and the best formats under a budget."""

from fxquant.search.mixed import MixedRecipe, mixed
from fxquant.search.mixed_recipe import Mixed
from fxquant.search.sensitivity import SensitivityReport, SensitivityRow, sensitivity

__all__ = ["Mixed", "MixedRecipe", "SensitivityReport", "SensitivityRow", "mixed", "sensitivity"]
