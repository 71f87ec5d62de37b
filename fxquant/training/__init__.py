"""What drives a training: its stages, BatchNorm statistics taken anew, and a teacher."""

from fxquant.training import distill

__all__ = ["distill"]
