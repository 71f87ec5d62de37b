"""A product of backward whose one operand has codes, written into a joint graph as one of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument, argument_at, operand
from fxquant.graph.edit import call
from fxquant.graph.inline import Bodies, Table, keep_tags, paste
from fxquant.graph.meta import mark_masked_gradient
from fxquant.graph.nodes import packet
from fxquant.numerics.gradients import Form, product
from fxquant.ops.quantize import DEQUANTIZE, DEQUANTIZE_CHANNEL
from fxquant.ops.rounding_words import ROUNDING_WORDS
from fxquant.ops.saved import UNPACK_PLANES
from fxquant.passes.joint.integer_products import Rewriter
from fxquant.passes.joint.quantized_products import (
    Operand,
    StaysFloat,
    axis_after,
    is_fake_quantize,
    is_zero,
    operand_of,
    operands_of,
    origin,
)

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Coded:
    """An operand that has codes: a fake-quant's result, or codes that are dequantized, and what moves them from there.

    ``axis`` is the operand's dimension that has one scale per slice, None with one scale for all; ``zero`` is None
    where the zero point is known to be 0. ``fake_quantized`` is None where the codes are there.
    """

    source: fx.Node
    moves: tuple[fx.Node, ...]
    axis: int | None
    scale: fx.Node
    zero: fx.Node | None
    signed: bool
    fake_quantized: Operand | None


def has_codes(node: fx.Node) -> bool:
    """Whether a node's values are those of codes, moved at most."""
    source, _ = origin(node)
    return is_fake_quantize(source) or source.target in DEQUANTIZE


def coded(node: fx.Node) -> Coded:
    """The operand that a node is; StaysFloat where its codes are none that integer kernels take."""
    source, moves = origin(node)
    if source.target not in DEQUANTIZE:
        found = operand_of(source, moves)
        scale, signed = found.quant.scale, found.limits[0] < 0
        assert isinstance(scale, fx.Node), "operand_of takes scales in tensors only"
        return Coded(source, moves, found.axis, scale, found.zero, signed, found)
    code, point = _bytes(source), argument(source, "zero_point")
    if code is None or not isinstance(point, fx.Node):
        raise StaysFloat(f"the codes of {source.name} have more than 8 bits")
    if point.meta["val"].is_floating_point():
        raise StaysFloat(f"the zero point of {source.name} is no integer")
    axis = None
    if source.target is DEQUANTIZE_CHANNEL:
        axis = axis_after(source, argument(source, "axis"), moves)
    zero = None if is_zero(point) else point
    signed = code.meta["val"].dtype is not torch.uint8
    return Coded(source, moves, axis, operand(source, "scale"), zero, signed, None)


def _bytes(source: fx.Node) -> fx.Node | None:
    """The codes that a node dequantizes, if they are of 8 bits; unpacked ones are int32 until they are cast."""
    code = operand(source, "code")
    if code.meta["val"].dtype in (torch.int8, torch.uint8):
        return code
    packed = code if code.target is UNPACK_PLANES else argument_at(code, 0) if packet(code) is aten.add else None
    return code if isinstance(packed, fx.Node) and packed.target is UNPACK_PLANES else None


@dataclass(frozen=True)
class GradientProduct:
    """``mm`` of a gradient and of an operand with codes, on either side."""

    node: fx.Node
    gradient: fx.Node
    operand: Coded
    gradient_first: bool

    @property
    def base(self) -> fx.Node:
        """The gradient before it was turned, as it lies in memory."""
        return self.gradient.all_input_nodes[0] if self._is_turned else self.gradient

    @property
    def stored(self) -> fx.Node:
        """The gradient before all that moves it."""
        return _stored(self.base)

    @property
    def _is_turned(self) -> bool:
        return _turns(self.gradient)

    @property
    def columns(self) -> bool:
        """Whether the base has a column for each slice that is summed, [S, R]; else it is [R, S]."""
        return self._is_turned == self.gradient_first

    @property
    def summed(self) -> int | torch.SymInt:
        """How many products a sum has; a number where either operand knows it."""
        first, second = operands_of(self.node)
        sizes = first.meta["val"].shape[1], second.meta["val"].shape[0]
        return next((size for size in sizes if isinstance(size, int)), sizes[0])

    def dim_of_codes(self, axis: int | None) -> int | None:
        """A dimension of the operand as one of codes [S, K]."""
        return axis if axis is None or self.gradient_first else 1 - axis


def _turns(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    name = packet(node)
    if name not in (aten.t, aten.transpose, aten.permute) or node.meta["val"].dim() != 2:
        return False
    if name is aten.permute:
        return [dim % 2 for dim in argument(node, "dims")] == [1, 0]
    return name is aten.t or (argument_at(node, 1) - argument_at(node, 2)) % 2 == 1


class Writer:
    """Puts products of gradients' codes into a graph."""

    def __init__(self, graph: fx.Graph, table: Table | None) -> None:
        self.graph, self.rewriter, self.bodies = graph, Rewriter(graph, table), Bodies(table)

    def replace(self, each: GradientProduct, by_chance: bool, outliers: int = 0) -> None:
        """The product from codes, but for ``outliers`` of what it sums; its gradient is rounded by chance or not."""
        node, operand = each.node, each.operand
        with self.graph.inserting_before(node):
            code = self._codes(operand)
            gradient, columns = each.base, each.columns
            if not each.gradient_first:
                code = self._call(aten.permute.default, code, [1, 0], like=node)
            if not columns and not operand.signed:  # torch multiplies uint8 from the left only
                gradient, columns = self._call(aten.permute.default, gradient, [1, 0], like=node), True
            words = self._words(gradient, node) if by_chance else None
            form = Form(
                columns=columns,
                turned=not each.gradient_first,
                scale_dim=each.dim_of_codes(operand.axis),
                zero_dim=each.dim_of_codes(operand.axis),
                dtype=node.meta["val"].dtype,
                outliers=outliers,
            )
            given = (gradient, code, operand.scale, operand.zero, words)
            new = self._paste(node, form, given)
        mark_masked_gradient(each.stored)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        for old in dict.fromkeys((each.gradient, *reversed(operand.moves), operand.source)):
            if not old.users:
                self.graph.erase_node(old)

    def _words(self, gradient: fx.Node, node: fx.Node) -> fx.Node:
        rows, columns = gradient.meta["val"].shape
        found = call(self.graph, ROUNDING_WORDS, rows + columns, device=gradient.meta["val"].device, like=node)
        keep_tags(found, node)
        return found

    def _paste(self, node: fx.Node, form: Form, given: Sequence[fx.Node | None]) -> Any:
        there = tuple(each is not None for each in given)
        operands = [each for each in given if each is not None]

        def arithmetic(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            grad, code, scale, zero, words = (next(rest) if is_there else None for is_there in there)
            assert grad is not None and code is not None and scale is not None
            return product(grad, code, scale, zero, words, form)

        return paste(self.graph, self.bodies.of((form, there), arithmetic, operands), operands, origin=node)

    def _codes(self, operand: Coded) -> fx.Node:
        if operand.fake_quantized is not None:
            return self.rewriter.moved_codes(operand.fake_quantized, operand.signed)[0]
        code = _bytes(operand.source)
        assert code is not None, f"{operand.source.name} has codes of 8 bits"
        if code.meta["val"].dtype is torch.int32:
            code = self._call(prims.convert_element_type.default, code, torch.int8, like=operand.source)
        return self.rewriter.moved(code, operand.moves)

    def _call(self, op: Any, /, *args: Any, like: fx.Node) -> fx.Node:
        node = call(self.graph, op, *args, like=like)
        keep_tags(node, like)
        return node


def _stored(gradient: fx.Node) -> fx.Node:
    """What views of a gradient look at."""
    while packet(gradient) in (aten.view, aten.reshape, aten._unsafe_view):
        gradient = gradient.all_input_nodes[0]
    return gradient
