"""What a plan and its graphs mean, for people: reads them, changes nothing."""

from fxquant.report.explanation import Explanation, explain
from fxquant.report.mixed import MixedRecipe, mixed
from fxquant.report.sensitivity import SensitivityReport, SensitivityRow, sensitivity
from fxquant.report.sqnr import sqnr

__all__ = [
    "Explanation",
    "MixedRecipe",
    "SensitivityReport",
    "SensitivityRow",
    "explain",
    "mixed",
    "sensitivity",
    "sqnr",
]
