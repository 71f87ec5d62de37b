"""Which layers of a Q/DQ file a runtime computes faster in float: found by measurement, said as rules for training."""

from fxquant.onnx.tuning.report import LayerRow, TuneReport
from fxquant.onnx.tuning.tune import tune_onnx

__all__ = ["LayerRow", "TuneReport", "tune_onnx"]
