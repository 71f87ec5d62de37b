"""What the functions that torch's exporter calls for an operator share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Value = Any
"""A value of the graph that the exporter writes: onnxscript has one class of them, torch another."""


def without_annotations(table: Mapping[Any, Callable[..., Value]]) -> dict[Any, Callable[..., Value]]:
    """The same functions, their annotations dropped.

    The exporter reads an annotation as an ONNX type, ``int`` as an attribute, and calls a function only with what fits.
    An argument without one is handed on as the graph has it.
    """
    for function in table.values():
        function.__annotations__ = {}
    return dict(table)


def constant(op: Any, value: Any) -> Value:
    """A Constant node of a numpy scalar or array."""
    import onnx_ir as ir

    return op.Constant(value=ir.tensor(value))
