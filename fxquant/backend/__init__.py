"""The torch.compile backends."""

from fxquant.backend.entry import fxquant, fxquant_eager
from fxquant.backend.reports import CompileReport, compile_reports

__all__ = ["CompileReport", "compile_reports", "fxquant", "fxquant_eager"]
