"""Backward products of a gradient and a quantized tensor as products of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxquant.graph.arguments import operand
from fxquant.graph.nodes import packet
from fxquant.ops.integer_matmul import LONGEST_SUM, multiplies_exactly
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint.integer_gradients import GradientProduct, Writer, coded, has_codes
from fxquant.passes.joint.joint import Joint
from fxquant.passes.joint.kept_times import instructions
from fxquant.passes.joint.last_layers import is_of_last_layer
from fxquant.passes.joint.product_times import Problem, never_faster, rows_timed, seconds_of_a_sweep, times
from fxquant.passes.joint.quantized_products import PRODUCTS, StaysFloat, hint, is_backward, multiplies, operands_of
from fxquant.passes.stages import JOINT

Rounding = Literal["stochastic", "nearest"]
aten = torch.ops.aten

MOST_OUTLIERS = 0.25
_MARGIN = 1.1  # as `UseIntegerMatmul` has it
# Sweeps over a gradient that an integer product takes and a float one does not: for its extremes, for its codes, and
# what rounding by chance costs beside. Outliers take two more: to find them, and to set them apart.
_SWEEPS: dict[Rounding, int] = {"nearest": 2, "stochastic": 3}


@dataclass(frozen=True, kw_only=True)
class IntegerBackward:
    """What ``options={"integer_backward": …}`` asks for.

    Attributes:
        mode: True takes integers wherever that is possible, "auto" where they are faster by times measured here, False
            nowhere.
        rounding: of the gradients that parameters get: "stochastic" is theirs on average, "nearest" draws no numbers.
        outliers: the share of what a product sums over, as tokens or channels, that stays float in it: where the
            gradient is largest. 0 for none; at most `MOST_OUTLIERS`.
    """

    mode: bool | Literal["auto"] = False
    rounding: Rounding = "stochastic"
    outliers: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UseIntegerBackward(Pass):
    """Joint graph, in backward::

        dx = mm(dy, FQ(w, t))           →   dx = float(_int_mm(q(dy · t), q(w))) · s        s: a step for each row
        dw = mm(dyᵀ, FQ(x, s, z))       →   dw = float(_int_mm(q(x)ᵀ, q(dy)) − z·Σq(dy)) · (s · u)    u: for each column

    The gradient is rounded to 8 bits of its largest value in each row or column that is summed
    (`fxquant.numerics.gradients`). What is read by another product is rounded to the nearest, as is one of an open
    size; what only goes out of the graph, as a parameter's gradient, up or down by chance, so that it is the exact one
    on average, by numbers that follow from the state of torch's generator (`rounding_words`). The codes of the other
    operand are those of its fake-quant, or those that `SaveQuantizedActivations` saved; nothing is dequantized for the
    product, but of what ``outliers`` keeps in float. Masks of straight-through gradients, biases' and scales' gradients
    are computed as without, from these.

    ``mm`` only, on CPU: products of batches, convolutions and what is on a GPU stay float, and their reason is told. So
    do those of the last layer (`is_of_last_layer`): of logits' gradients codes keep the largest and little else, and
    what is lost there all other gradients lack. In integers, a character model's gradients had a cosine of 0.95 to 0.98
    to float's at the parameter where it was least, before, amid and after 100 steps of three seeds; so 0.999.
    """

    stages: ClassVar = (JOINT,)

    options: IntegerBackward = field(default_factory=IntegerBackward)
    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] | None = field(default=None, repr=False)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces backward products; declines name those of a quantized tensor that stay."""
        found: list[GradientProduct] = []
        after_tangents = Joint(gm.graph).after_tangents
        for node in filter(_is_candidate, gm.graph.nodes):
            try:
                each = _read(node)
                _check(each)
                if is_of_last_layer(each.stored, after_tangents):
                    raise StaysFloat("it is the last layer's, whose gradient all others are made of")
                self._weigh(each, self._is_by_chance(each))
            except StaysFloat as reason:
                self.decline(result, node, f"float product in backward: {reason}")
            else:
                found.append(each)
        by_chance = [self._is_by_chance(each) for each in found]
        writer = Writer(gm.graph, None if self.decompositions is None else self.decompositions())
        for each, drawn in zip(found, by_chance, strict=True):
            writer.replace(each, drawn, self._outliers(each))
        return len(found)

    def uuid(self) -> str:
        """With the processor's instructions, by which it is known whether integer kernels are exact."""
        return f"{super().uuid()}-{instructions()}"

    def _is_by_chance(self, each: GradientProduct) -> bool:
        """What is as long as the batch, whose size may be open, draws nothing: it is of the input."""
        sizes = each.gradient.meta["val"].shape
        if self.options.rounding != "stochastic" or not all(isinstance(size, int) for size in sizes):
            return False
        return not _reaches_a_product(each.node)

    def _outliers(self, each: GradientProduct) -> int:
        """How many of what a product sums over stay float; one at least where any are to."""
        assert isinstance(each.summed, int), "_check lets no open sums through"
        return math.ceil(self.options.outliers * each.summed)

    def _weigh(self, each: GradientProduct, by_chance: bool) -> None:
        if self.options.mode != "auto":
            return
        problem = _problem(each)
        if why_not := never_faster(problem.device):
            raise StaysFloat(why_not)
        found, share = times(problem), rows_timed(problem) / problem.lhs[0]
        elements = share * math.prod(map(hint, each.gradient.meta["val"].shape))
        sweeps = _SWEEPS["stochastic" if by_chance else "nearest"] + (2 if self.options.outliers else 0)
        integer = found.integer + sweeps * elements * seconds_of_a_sweep() + self.options.outliers * found.floating
        if integer * _MARGIN > found.floating:
            raise StaysFloat(f"integers take {integer / found.floating:.2f} of its time here, as measured")


def _is_candidate(node: fx.Node) -> bool:
    """Whether a node is a product of backward with a quantized operand."""
    if node.op != "call_function" or not is_backward(node):
        return False
    if packet(node) is aten.convolution_backward:
        return any(has_codes(operand(node, name)) for name in ("input", "weight"))
    return node.target in PRODUCTS and any(map(has_codes, operands_of(node)))


def _read(node: fx.Node) -> GradientProduct:
    """The parts of a product; StaysFloat where it is none of a gradient and codes."""
    if packet(node) in (aten.convolution, aten.convolution_backward):
        raise StaysFloat("torch has no gradient of an integer convolution")
    if packet(node) in (aten.bmm, aten.baddbmm):
        raise StaysFloat("torch has no product of batches of integer matrices")
    if packet(node) is not aten.mm:
        raise StaysFloat("a matrix is added to it")
    first, second = operands_of(node)
    if has_codes(first) and has_codes(second):
        raise StaysFloat("neither operand is a gradient")
    gradient_first = has_codes(second)
    gradient, other = (first, second) if gradient_first else (second, first)
    return GradientProduct(node, gradient, coded(other), gradient_first)


def _check(each: GradientProduct) -> None:
    """Raises StaysFloat for products that no integer kernel does."""
    value = each.node.meta["val"]
    if value.device.type != "cpu":
        raise StaysFloat(f"gradients are rounded to codes on CPU only, not on {value.device.type}")
    if value.dtype == torch.float64:
        raise StaysFloat("it is float64")
    if not isinstance(each.summed, int):
        raise StaysFloat("the length of its sums is symbolic")
    if each.summed > LONGEST_SUM:
        raise StaysFloat(f"its sums of {each.summed} products may not fit int32")
    why_not = multiplies_exactly("matmul", str(value.device), each.operand.signed)
    if why_not:
        raise StaysFloat(why_not)


def _problem(each: GradientProduct) -> Problem:
    """The product as `Writer` takes it: with uint8 codes on the left."""
    rows, columns = map(hint, each.node.meta["val"].shape)
    outer, inner = (columns, rows) if each.gradient_first else (rows, columns)  # of the codes, of the gradient
    left, right = (outer, inner) if each.columns or not each.operand.signed else (inner, outer)
    summed = hint(each.summed)
    value = each.node.meta["val"]
    signed = each.operand.signed
    return Problem(lhs=(left, summed), rhs=(summed, right), dtype=value.dtype, device=str(value.device), signed=signed)


def _reaches_a_product(node: fx.Node) -> bool:
    """Whether another product, or attention, reads what a node gives, however changed."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if multiplies(user):
                return True
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return False
