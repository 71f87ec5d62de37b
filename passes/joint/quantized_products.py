"""Products in a joint graph whose two operands are fake-quants, seen through what moves values.

::

    addmm(b, cast(FQ(x, s, z)), t(FQ(w, t)))   is   a product of the operands FQ(x, s, z) and t(FQ(w, t))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at
from fxquant.graph.moves import CASTING, KEEPING, SHAPING, TURNING, ZEROS
from fxquant.graph.nodes import packet
from fxquant.graph.views import AffineQparams, FakeQuant, qparams_of

aten = torch.ops.aten

# product → where its operands and its bias stand
PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.bmm.default: (0, 1, None),
    aten.baddbmm.default: (1, 2, 0),
    aten.convolution.default: (0, 1, 2),
}

_SEEN_THROUGH = KEEPING | TURNING | SHAPING | CASTING


@dataclass(frozen=True)
class Operand:
    """One operand of a product: the fake-quant it comes from and the nodes that move its values on the way.

    ``axis`` is the operand's dimension that has one scale per slice, None with one scale for all. ``zero`` is None
    where the zero point is known to be 0.
    """

    quant: FakeQuant
    moves: tuple[fx.Node, ...]
    axis: int | None
    zero: fx.Node | None

    @property
    def source(self) -> fx.Node:
        """The node of the fake-quant."""
        return self.quant.node

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest code and the highest."""
        return self.quant.quant_min, self.quant.quant_max


class StaysFloat(Exception):
    """Why a product of two fake-quantized tensors stays float."""


def operands_of(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two nodes that a product multiplies."""
    first, second, _ = PRODUCTS[product.target]
    lhs, rhs = argument_at(product, first), argument_at(product, second)
    assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node), f"{product.name} multiplies {lhs} and {rhs}"
    return lhs, rhs


def multiplies(node: fx.Node) -> bool:
    """Whether a node is a product of either half, or attention."""
    return node.target in PRODUCTS or packet(node) is aten.convolution_backward or "attention" in str(node.target)


def hint(size: int | torch.SymInt) -> int:
    """A size, of a symbolic one what it was when the graph was traced."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def is_backward(node: fx.Node) -> bool:
    """Whether the node is a part of the backward half."""
    return node.meta.get("partitioner_tag") == "is_backward"


def is_fake_quantize(node: fx.Node) -> bool:
    """Whether the node is a fake-quant of any family."""
    return node.op == "call_function" and str(node.target).startswith("fxquant.fake_quantize")


def origin(value: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node whose values an operand holds, and what moves them, from there on."""
    moves: list[fx.Node] = []
    while value.op == "call_function" and packet(value) in _SEEN_THROUGH and value.meta["val"].is_floating_point():
        before = argument_at(value, 0)
        if not isinstance(before, fx.Node) or not before.meta["val"].is_floating_point():
            break
        moves.append(value)
        value = before
    return value, tuple(reversed(moves))


def operand_of(source: fx.Node, moves: tuple[fx.Node, ...]) -> Operand:
    """The operand that a fake-quant gives; StaysFloat where it has no codes of 8 bits with tensors for qparams."""
    quant = FakeQuant.of(source)
    if quant is None:
        raise StaysFloat(f"{packet(source)} is no affine quantizer")
    if quant.element is not None:
        raise StaysFloat(f"the codes of {source.name} are {quant.element}, no integers")
    point = quant.zero_point
    if not isinstance(point, fx.Node):
        raise StaysFloat(f"the scale of {source.name} is a number")
    if source.meta["val"].dtype == torch.float64:
        raise StaysFloat(f"{source.name} is float64")
    if point.meta["val"].is_floating_point():
        raise StaysFloat(f"the zero point of {source.name} is no integer")
    axis = None if quant.axis is None else axis_after(source, quant.axis, moves)
    found = Operand(quant, moves, axis, None if is_zero(point) else point)
    low, high = found.limits
    if low < -128 or high > 255 or (low < 0 and high > 127):
        raise StaysFloat(f"the codes of {source.name} have more than 8 bits: [{low}, {high}]")
    return found


def axis_after(source: fx.Node, axis: int, moves: Sequence[fx.Node]) -> int:
    """The dimension that the channels of a fake-quant have after all that moves them."""
    for node in moves:
        name, dims = packet(node), node.meta["val"].dim()
        if name is aten.t or name is aten.transpose:
            pair = (0, dims - 1) if name is aten.t else _turned([argument_at(node, i) for i in (1, 2)], dims)
            axis = pair[1 - pair.index(axis)] if axis in pair else axis
        elif name is aten.permute:
            axis = _turned(argument(node, "dims"), dims).index(axis)
        elif name not in KEEPING | CASTING:
            raise StaysFloat(f"{node.name} moves the channels of {source.name}")
    return axis


def _turned(dims: Any, count: int) -> tuple[int, ...]:
    return tuple(dim % count for dim in dims)


def is_zero(point: object) -> bool:
    """Whether a zero point is 0 whatever the data."""
    if not isinstance(point, fx.Node) or point.op != "call_function":
        return False
    if packet(point) is aten.full or packet(point) is aten.full_like:
        return bool(argument(point, "fill_value") == 0)
    if packet(point) in KEEPING | SHAPING:
        return is_zero(argument_at(point, 0))
    made = qparams_of(point)
    if isinstance(made, AffineQparams):
        return made.symmetric is True and made.quant_min < 0
    return packet(point) in ZEROS or made is not None


def is_signed(node: fx.Node, lhs: Operand) -> bool:
    """Whether the left codes are int8: on CPU uint8 has a kernel too, and is the only one of convolutions."""
    if node.target is aten.convolution.default:
        return False
    return node.meta["val"].device.type == "cuda" or lhs.limits[0] < 0
