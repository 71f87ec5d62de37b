"""The products of one training step: which multiply codes, forward and backward, and their shares of the work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backend.inductor.step import Step
from fxquant.graph.arguments import argument, operand
from fxquant.graph.nodes import packet
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION

aten = torch.ops.aten

# The left operand of each.
_MATRICES = {aten.mm: "self", aten._int_mm: "self", aten.addmm: "mat1", aten.bmm: "self", aten.baddbmm: "batch1"}


@dataclass(frozen=True, kw_only=True)
class StepProduct:
    """One product of a compiled step.

    Attributes:
        half: "forward" or "backward".
        operator: what computes it, as ``aten.mm``.
        shapes: of its operands of two or more dimensions; an open batch as in the example.
        integer: whether it multiplies 8-bit codes and adds up in int32.
        work: multiply-adds.
        share: of the work of all products of the step. Of time it is none: an integer product takes a part of a float
            one's (``python bench/bench_step.py --where`` measures).
    """

    half: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    integer: bool
    work: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "shapes": [list(shape) for shape in self.shapes]}


def products_of_step(step: Step) -> tuple[StepProduct, ...]:
    """Every product of a step, forward first, in execution order."""
    found = [*_products(step.forward, "forward"), *_products(step.backward, "backward")]
    total = sum(work for *_, work in found) or 1
    return tuple(
        StepProduct(
            half=half,
            operator=str(packet(node)),
            shapes=_shapes(node),
            integer=packet(node) is aten._int_mm or node.target is INTEGER_CONVOLUTION,
            work=work,
            share=work / total,
        )
        for half, node, work in found
    )


def _products(gm: fx.GraphModule, half: str) -> Iterator[tuple[str, fx.Node, int]]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and (work := _work(node)):
            yield half, node, work


def _work(node: fx.Node) -> int:
    """Multiply-adds; 0 for what is no product."""
    name, given = packet(node), [_shape(each) for each in node.all_input_nodes]
    if name in _MATRICES:
        return _count(_shape(operand(node, _MATRICES[name]))) * _shape(node)[-1]
    if name is aten.convolution or node.target is INTEGER_CONVOLUTION:
        return _count(_shape(node)) * _count(given[1][1:])
    if name is aten.convolution_backward:
        gradient, weight = (_shape(operand(node, each)) for each in ("grad_output", "weight"))
        return sum(argument(node, "output_mask")[:2]) * _count(gradient) * _count(weight[1:])
    text = str(name)
    if "scaled_dot_product" not in text:
        return 0
    query, key = (_shape(operand(node, each)) for each in ("query", "key"))
    return (5 if "backward" in text else 2) * _count(query) * key[-2]  # products of that size


def _shapes(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for shape in map(_shape, node.all_input_nodes) if len(shape) > 1)


def _shape(value: Any) -> tuple[int, ...]:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(found, Tensor):
        return ()
    return tuple(size if isinstance(size, int) else int(size.node.hint or 1) for size in found.shape)


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
