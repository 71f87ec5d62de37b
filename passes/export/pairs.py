"""Views of the two operators that stand for ONNX nodes, and how a quantized value is quantized once more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, operand
from fxquant.graph.edit import call
from fxquant.graph.moves import unmoved
from fxquant.graph.views import View
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE

aten = torch.ops.aten

MATMULS = frozenset({aten.matmul, aten.bmm, aten.mm})
CONVOLUTIONS = frozenset(
    {
        *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    }
)


@dataclass(frozen=True)
class Pair(View):
    """``quantize_dequantize(input, scale, zero_point, quant_min, quant_max, label)``: a Q/DQ pair."""

    OPS: ClassVar[Collection[Any]] = (QUANTIZE_DEQUANTIZE,)

    @property
    def input(self) -> fx.Node:
        """What is quantized."""
        return operand(self.node, "input")

    @property
    def scale(self) -> float:
        """One number for the tensor."""
        return argument(self.node, "scale")

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        return argument(self.node, "zero_point")

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return argument(self.node, "quant_min"), argument(self.node, "quant_max")

    @property
    def element(self) -> str | None:
        """The small float that codes are, None for integers."""
        return argument(self.node, "element")

    @property
    def label(self) -> str:
        """What QuantizeLinear's result is called in the file."""
        return argument(self.node, "label")


@dataclass(frozen=True)
class Dequantized(View):
    """``dequantize_affine(code, scale, zero_point, axis, block_size)``: DequantizeLinear of a constant."""

    OPS: ClassVar[Collection[Any]] = (DEQUANTIZE,)

    @property
    def code(self) -> fx.Node:
        """The integers."""
        return operand(self.node, "code")

    @property
    def scale(self) -> fx.Node:
        """One number, one for each slice of ``axis``, or one for each block there."""
        return operand(self.node, "scale")

    @property
    def zero_point(self) -> fx.Node:
        """In the form of the scale."""
        return operand(self.node, "zero_point")

    @property
    def axis(self) -> int | None:
        """None with one scale for the tensor."""
        return argument(self.node, "axis")

    @property
    def block_size(self) -> int | None:
        """How many values in a row share a scale, None where a slice does."""
        return argument(self.node, "block_size")

    @property
    def element(self) -> str | None:
        """The small float that codes are, each a byte with its bits; None for integers."""
        return argument(self.node, "element")


def named(element: str | None) -> dict[str, str]:
    """What operators are told of codes that are small floats; nothing of integers."""
    return {} if element is None else {"element": element}


def elements_of(graph: fx.Graph) -> dict[str, str]:
    """Constants that are codes of small floats, by name → the float."""
    views = (Dequantized.of(node) for node in graph.nodes)
    return {str(view.code.target): view.element for view in views if view is not None and view.element is not None}


def pair_before(value: object) -> Pair | None:
    """The Q/DQ pair that a value comes out of, moved at most."""
    return Pair.of(unmoved(value)) if isinstance(value, fx.Node) else None


def is_quantized_again(value: fx.Node, pair: Pair) -> bool:
    """Whether `quantized_again` has been here."""
    return any(again.label == _label(value, pair) for again in map(Pair.of, value.users) if again is not None)


def _label(value: fx.Node, pair: Pair) -> str:
    return f"{pair.label}@{value.name}"


def quantized_again(value: fx.Node, pair: Pair) -> fx.Node:
    """``QDQ(value)`` right after a value that is ``pair``'s, moved: the same codes."""
    grid = (pair.scale, pair.zero_point, *pair.limits, _label(value, pair))
    with value.graph.inserting_after(value):
        return call(value.graph, QUANTIZE_DEQUANTIZE, value, *grid, like=value, **named(pair.element))
