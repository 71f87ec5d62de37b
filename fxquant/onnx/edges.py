"""The inputs and outputs of a file that computes in float32 for a model of another precision: they are the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.capture.in_float32 import is_other, output_types
from fxquant.onnx.feeds import tensors_of
from fxquant.onnx.typed import cast_of, data_type

NOTE = "a model of half or double precision computes in float32 here: QuantizeLinear and a CPU know no better"


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The types of a model's inputs and outputs, flattened in order."""

    inputs: list[torch.dtype]
    outputs: list[torch.dtype]

    @classmethod
    def single(cls, graph: Any) -> Edges:
        """Of a model of float32, whose file is ``graph``."""
        return cls(inputs=[torch.float32] * len(graph.inputs), outputs=[torch.float32] * len(graph.outputs))

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Edges | None:
        """Of a model of half or double precision, which is run once; None for others."""
        if not is_other(model):
            return None
        inputs = [leaf.dtype for leaf in tensors_of(args, kwargs)]
        return cls(inputs=inputs, outputs=output_types(model, args, kwargs))

    def narrow(self, graph: Any, io_dtype: torch.dtype | None = None) -> None:
        """``y = f(x)`` in float32  →  ``y = Cast(f(Cast(x, FLOAT)), FLOAT16)``, where the model's are; so for DOUBLE.

        bfloat16 ones stay float32 in the file: numpy, by which runtimes are fed, has no such type. ``io_dtype``: all
        that are float have this type instead.
        """
        import onnx_ir as ir

        for value, dtype in zip(graph.inputs, self.inputs, strict=True):
            to = _edge(value, dtype, io_dtype)
            if to is not None:
                cast = cast_of(value, ir.DataType.FLOAT)
                ir.convenience.replace_all_uses_with(value, cast.outputs[0])
                cast.replace_input_with(0, value)
                value.type = ir.TensorType(to)
                graph.insert_before(graph[0], cast)
        for index, (value, dtype) in enumerate(zip(list(graph.outputs), self.outputs, strict=True)):
            to = _edge(value, dtype, io_dtype)
            if to is not None:
                cast = cast_of(value, to)
                cast.outputs[0].name, value.name = value.name, cast.outputs[0].name
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]


def _edge(value: Any, own: torch.dtype, io_dtype: torch.dtype | None) -> Any:
    """The type of an edge, None where it is as the file computes it."""
    import onnx_ir as ir

    if value.dtype != ir.DataType.FLOAT:
        return None
    wanted = io_dtype if io_dtype is not None else torch.float32 if own == torch.bfloat16 else own
    to = data_type(wanted)
    return None if to == ir.DataType.FLOAT else to
