"""The exceptions of fxquant's own, all of them FxquantError.

Operators that stand for torch's or ModelOpt's raise what those raise for the same fault: RuntimeError, IndexError,
NotImplementedError, in `tensor_quant` TypeError.

A message reads ``<subject> must <rule>: got <value> (<where>). <How to fix it>.``
"""

from __future__ import annotations


class FxquantError(Exception):
    """Base of every fxquant error."""


class InvalidArgument(FxquantError, ValueError):
    """An argument has a value that its parameter does not allow."""


class UnsupportedModel(FxquantError, RuntimeError):
    """The model cannot be quantized as asked, for a reason that lies in the model."""


class PlanMismatch(FxquantError, RuntimeError):
    """A checkpoint or a graph belongs to another plan than the model's."""


class RangeNotSet(FxquantError, RuntimeError):
    """Ranges were needed before any data, or any but zeros, was seen."""


class ExportError(FxquantError, RuntimeError):
    """The model could not be written, or what was written cannot be loaded."""


class CompilerMissing(FxquantError, RuntimeError):
    """Inductor needs a compiler that is not on this machine."""


class KernelUnavailable(FxquantError, RuntimeError):
    """fxquant's own CUDA kernels were asked for and cannot be had; the message holds the reason and the fix."""


class MissingDependency(FxquantError, ImportError):
    """An optional package is not installed; the message holds the install command."""


class InvariantViolated(FxquantError, AssertionError):
    """A pass received or produced a graph that breaks the IR's rules: a bug in fxquant."""


class NotQuantizedWarning(UserWarning):
    """A part of a prepared model ran, or was exported, without its quantizers."""


class RangeNotSetWarning(UserWarning):
    """A model is evaluated with the range of each batch, since no data had set one."""


class ExportWarning(UserWarning):
    """A model trains, and may not export as it is."""
