"""Formats by measurement: what each site costs, and the best formats under a budget."""

from fxquant.search.mixed import MixedRecipe, mixed
from fxquant.search.sensitivity import SensitivityReport, SensitivityRow, sensitivity
from fxquant.search.within import Mixed

__all__ = ["Mixed", "MixedRecipe", "SensitivityReport", "SensitivityRow", "mixed", "sensitivity"]
