"""Export to ONNX QuantizeLinear/DequantizeLinear, and the proof that the file does what training saw."""

from fxquant.onnx.export import ExportReport, export_onnx
from fxquant.onnx.lint import LintReport, lint_onnx
from fxquant.onnx.translate import translation_table
from fxquant.onnx.tuning import TuneReport, tune_onnx
from fxquant.onnx.verify import verify_onnx
from fxquant.onnx.verify_report import VerifyReport

__all__ = [
    "ExportReport",
    "LintReport",
    "TuneReport",
    "VerifyReport",
    "export_onnx",
    "lint_onnx",
    "translation_table",
    "tune_onnx",
    "verify_onnx",
]
