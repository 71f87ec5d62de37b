"""What a plan and its graphs mean, for people: reads them, changes nothing."""

from fxquant.report.cost import Cost, cost
from fxquant.report.coverage import Coverage
from fxquant.report.explanation import Explanation, explain
from fxquant.report.page import html
from fxquant.report.sqnr import sqnr
from fxquant.search.mixed import MixedRecipe, mixed
from fxquant.search.mixed_recipe import Mixed
from fxquant.search.sensitivity import SensitivityReport, SensitivityRow, sensitivity

__all__ = [
    "Cost",
    "Coverage",
    "Explanation",
    "Mixed",
    "MixedRecipe",
    "SensitivityReport",
    "SensitivityRow",
    "cost",
    "explain",
    "html",
    "mixed",
    "sensitivity",
    "sqnr",
]
