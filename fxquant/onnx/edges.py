"""The inputs and outputs of a file that computes in float32 for a model of another precision: they are the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.capture.in_float32 import is_other, output_types
from fxquant.onnx.feeds import tensors_of

NOTE = "a model of half or double precision computes in float32 here: QuantizeLinear and a CPU know no better"


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The types of a model's inputs and outputs, flattened in order."""

    inputs: list[torch.dtype]
    outputs: list[torch.dtype]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Edges | None:
        """Of a model of half or double precision, which is run once; None for others."""
        if not is_other(model):
            return None
        inputs = [leaf.dtype for leaf in tensors_of(args, kwargs)]
        return cls(inputs=inputs, outputs=output_types(model, args, kwargs))

    def narrow(self, graph: Any) -> None:
        """``y = f(x)`` in float32  →  ``y = Cast(f(Cast(x, FLOAT)), FLOAT16)``, where the model's are; so for DOUBLE.

        bfloat16 ones stay float32 in the file: numpy, by which runtimes are fed, has no such type.
        """
        import onnx_ir as ir

        types = {torch.float16: ir.DataType.FLOAT16, torch.float64: ir.DataType.DOUBLE}
        for value, dtype in zip(graph.inputs, self.inputs, strict=True):
            if dtype in types:
                cast = _cast(value, ir.DataType.FLOAT, ir)
                ir.convenience.replace_all_uses_with(value, cast.outputs[0])
                cast.replace_input_with(0, value)
                value.type = ir.TensorType(types[dtype])
                graph.insert_before(graph[0], cast)
        for index, (value, dtype) in enumerate(zip(list(graph.outputs), self.outputs, strict=True)):
            if dtype in types:
                cast = _cast(value, types[dtype], ir)
                cast.outputs[0].name, value.name = value.name, cast.outputs[0].name
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]


def _cast(value: Any, to: Any, ir: Any) -> Any:
    node = ir.node("Cast", inputs=[value], attributes={"to": int(to)})
    (result,) = node.outputs
    result.name, result.shape, result.type = f"{value.name}_in_float32", value.shape, ir.TensorType(to)
    return node
