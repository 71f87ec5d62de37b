"""What a plan and its graphs mean, for people: reads them, changes nothing."""

from fxquant.report.explanation import Explanation, explain
from fxquant.report.sqnr import sqnr

__all__ = ["Explanation", "explain", "sqnr"]
