"""Products of codes, written into a joint graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument, argument_at
from fxquant.graph.edit import arguments_with, call
from fxquant.graph.inline import Bodies, Table, keep_tags, paste
from fxquant.graph.moves import CASTING
from fxquant.graph.nodes import packet
from fxquant.numerics import integer
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION
from fxquant.ops.quantize import QUANTIZE_CHANNEL, QUANTIZE_TENSOR
from fxquant.passes.joint.quantized_products import PRODUCTS, Operand, is_signed

aten = torch.ops.aten


class Rewriter:
    """Puts products of codes into a graph, the codes of a fake-quant once."""

    def __init__(self, graph: fx.Graph, table: Table | None) -> None:
        self.graph = graph
        self.codes: dict[tuple[fx.Node, bool], tuple[fx.Node, fx.Node | None]] = {}
        self.bodies = Bodies(table)

    def replace(self, node: fx.Node, lhs: Operand, rhs: Operand) -> None:
        """The product ``node`` from codes; what it read goes where nothing else reads it."""
        with self.graph.inserting_before(node):
            inputs = self._inputs(node, lhs, rhs)
            kernel = _kernel(node)
            form = kernel.func, str(kernel.keywords), tuple(inputs)
            body = self.bodies.of(form, _by_position(kernel, tuple(inputs)), list(inputs.values()))
            new = paste(self.graph, body, list(inputs.values()), origin=node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        for each in dict.fromkeys((*reversed(rhs.moves), rhs.source, *reversed(lhs.moves), lhs.source)):
            if not each.users:
                self.graph.erase_node(each)

    def _inputs(self, node: fx.Node, lhs: Operand, rhs: Operand) -> dict[str, Any]:
        """What a product of codes reads, by the names that `integer.matmul` has for it."""
        x, x_zero = self.moved_codes(lhs, is_signed(node, lhs))
        w, w_zero = self.moved_codes(rhs, True)
        place = PRODUCTS[node.target][2]
        bias = None if place is None else argument_at(node, place)
        optional = {"lhs_zero": x_zero, "rhs_zero": w_zero, "bias": bias}
        given = {"lhs": x, "rhs": w, "lhs_scale": lhs.quant.scale, "rhs_scale": rhs.quant.scale}
        return {**given, **{name: value for name, value in optional.items() if value is not None}}

    def moved_codes(self, operand: Operand, signed: bool) -> tuple[fx.Node, fx.Node | None]:
        """The codes where the operand has its values, and their zero point."""
        code, zero = self._codes(operand, signed)
        return self.moved(code, operand.moves), zero

    def moved(self, code: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
        """Codes, moved as ``moves`` do with the values that they stand for."""
        for node in moves:
            if packet(node) not in CASTING:
                args, kwargs = arguments_with(node, argument_at(node, 0), code)
                code = self._call(node.target, *args, like=node, **kwargs)
        return code

    def _codes(self, operand: Operand, signed: bool) -> tuple[fx.Node, fx.Node | None]:
        source, quant, (low, high) = operand.source, operand.quant, operand.limits
        if (source, signed) not in self.codes:
            shift = -128 if signed and high > 127 else 128 if not signed and low < 0 else 0
            point, zero = quant.zero_point, operand.zero
            if shift:
                point = zero = self._call(aten.add.Tensor, point, shift, like=source)
            op, axis = (QUANTIZE_TENSOR, ()) if quant.axis is None else (QUANTIZE_CHANNEL, (quant.axis,))
            # As SaveQuantizedActivations writes it, so that equal codes are computed once.
            limits = (low + shift, high + shift, torch.int8 if signed else torch.uint8)
            inputs = (quant.input, quant.scale, point, *axis, *limits)
            self.codes[source, signed] = self._call(op, *inputs, rounding=quant.rounding, like=source), zero
        return self.codes[source, signed]

    def _call(self, op: Any, /, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        node = call(self.graph, op, *args, like=like, **kwargs)
        keep_tags(node, like)
        return node


def _by_position(kernel: partial[Tensor], names: Sequence[str]) -> Callable[..., Tensor]:
    return lambda *operands: kernel(**dict(zip(names, operands, strict=True)))


def _kernel(node: fx.Node) -> partial[Tensor]:
    dtype = node.meta["val"].dtype
    if node.target is not aten.convolution.default:
        return partial(integer.matmul, dtype=dtype)
    where = tuple(argument(node, name) for name in ("stride", "padding", "dilation", "groups"))
    return partial(_convolution, where=where, dtype=dtype, contiguous=node.meta["val"].is_contiguous())


def _convolution(
    lhs: Tensor,
    rhs: Tensor,
    lhs_scale: Tensor,
    rhs_scale: Tensor,
    where: tuple[Any, ...],
    dtype: torch.dtype,
    contiguous: bool,
    lhs_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The sums of a convolution, rescaled; in memory as the float one has them."""
    zero = torch.zeros_like(lhs_scale, dtype=torch.int32) if lhs_zero is None else lhs_zero
    total = INTEGER_CONVOLUTION(lhs, rhs, zero, *where)
    channels = [-1] + [1] * (lhs.dim() - 2)
    bias = None if bias is None else bias.view(channels)
    value = integer.rescale(total, lhs_scale.view([1] * (lhs.dim() - 1)), rhs_scale.view(channels), bias, dtype)
    return value.contiguous() if contiguous else value
