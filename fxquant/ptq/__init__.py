"""Good starts: weights and ranges of a prepared model made better by data, without training."""

from fxquant.ptq.adaround import adaround
from fxquant.ptq.clip_weights import clip_weights
from fxquant.ptq.correct_bias import correct_bias
from fxquant.ptq.equalize import equalize
from fxquant.ptq.gptq import gptq
from fxquant.ptq.report import PtqReport, PtqRow
from fxquant.ptq.smooth import smooth

__all__ = ["PtqReport", "PtqRow", "adaround", "clip_weights", "correct_bias", "equalize", "gptq", "smooth"]
