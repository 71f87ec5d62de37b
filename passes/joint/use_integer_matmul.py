"""Forward products of two fake-quantized tensors as products of their codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument
from fxquant.graph.nodes import packet
from fxquant.graph.views import Convolution
from fxquant.ops.integer_matmul import LONGEST_SUM, multiplies_exactly
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint.integer_products import Rewriter
from fxquant.passes.joint.kept_times import instructions
from fxquant.passes.joint.product_times import (
    Problem,
    Window,
    never_faster,
    places,
    seconds_of_a_sweep,
    times,
    work,
)
from fxquant.passes.joint.quantized_products import (
    PRODUCTS,
    Operand,
    StaysFloat,
    hint,
    is_backward,
    is_fake_quantize,
    is_signed,
    operand_of,
    operands_of,
    origin,
)
from fxquant.passes.stages import JOINT

IntegerMatmul = bool | Literal["auto"]
aten = torch.ops.aten

# The integer product must be this much faster, so that noise in the times does not choose it where nothing is gained.
_MARGIN = 1.1
# The sums of a convolution are rescaled where they are read, not where they are made: in the loops of statistics, the
# normalization and the range, and in backward's. What that takes, in elementwise sweeps over memory: between 0 and 20
# a convolution in two nets with BatchNorm (AVX2, the machine busy); not measured where integers are fast.
_RESCALING = 12
_LEAST = 2**22  # multiply-adds: a tenth of a millisecond in float32 (EPYC, one thread), less is little to gain


@dataclass(frozen=True, kw_only=True)
class UseIntegerMatmul(Pass):
    """Joint graph: ``addmm(b, FQ(x, s, z), FQ(w, t))``  →  ``float(_int_mm(q(x), q(w)) − z·Σq(w)) · (s·t) + b``.

    ``mm``, ``addmm`` and, on CPU, ``convolution``, whose operands are fake-quants of at most 8 bits, seen through
    views, transposes and casts. Forward only: the gradient reads the fake-quants, which stay, so that it is that of the
    same values. The codes are those of the fake-quants, and the sums are exact, so the result is what an integer
    kernel gives; a float product differs from it by the rounding of its own sums.

    ``mode`` True takes integers wherever that is possible. "auto" takes them where they are faster, by times measured
    once per shape on machines like this one and kept (`product_times`), for a symbolic size at its hint: one machine
    chooses alike in every process. On a CPU without dot products of 8-bit integers it takes none, and measures nothing.
    What was decided otherwise elsewhere and comes from a cache computes the same sums, at the speed that was measured
    then.

    ``by_default``, where nobody asked: on CPU alone, of products that take some time, and nothing is said of those that
    stay float.

    Nodes keep the tags of what they replace; codes those of their fake-quants.
    """

    stages: ClassVar = (JOINT,)

    mode: IntegerMatmul = "auto"
    by_default: bool = False
    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] | None = field(default=None, repr=False)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces forward products; declines name those of two quantized tensors that stay."""
        rewriter = Rewriter(gm.graph, None if self.decompositions is None else self.decompositions())
        done = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in PRODUCTS or is_backward(node):
                continue
            origins = tuple(map(origin, operands_of(node)))
            if not all(is_fake_quantize(source) for source, _ in origins):
                continue
            try:
                lhs, rhs = (operand_of(*each) for each in origins)
                _check(node, lhs, rhs)
                self._weigh(node, lhs)
            except StaysFloat as reason:
                if not self.by_default:
                    self.decline(result, node, f"float product: {reason}")
            else:
                rewriter.replace(node, lhs, rhs)
                done += 1
        return done

    def uuid(self) -> str:
        """With the processor's instructions, by which it is known whether integer kernels are exact."""
        return f"{super().uuid()}-{instructions()}"

    def _weigh(self, node: fx.Node, lhs: Operand) -> None:
        if self.mode != "auto":
            return
        problem = _problem(node, lhs)
        if why_not := never_faster(problem.device):
            raise StaysFloat(why_not)
        if self.by_default and (problem.device != "cpu" or work(problem) < _LEAST):
            raise StaysFloat("nobody asked for integers there")
        found = times(problem)
        integer = found.integer
        if problem.convolution is not None:
            integer += _RESCALING * places(problem) * seconds_of_a_sweep()
        if integer * _MARGIN > found.floating:
            raise StaysFloat(f"integers take {integer / found.floating:.2f} of its time here, as measured")


def _check(node: fx.Node, lhs: Operand, rhs: Operand) -> None:
    """Raises StaysFloat for products that no integer kernel does."""
    if packet(node) in (aten.bmm, aten.baddbmm):
        raise StaysFloat("torch has no product of batches of integer matrices")
    if any(has_argument(node, factor) and argument(node, factor) != 1 for factor in ("alpha", "beta")):
        raise StaysFloat("it is scaled by alpha or beta")
    is_conv = node.target is aten.convolution.default
    outer = (None, 0) if is_conv else (0, 1)
    for operand, allowed in zip((lhs, rhs), outer, strict=True):
        if operand.axis is not None and operand.axis != allowed:
            raise StaysFloat(f"{operand.source.name} has a scale per channel of a dimension that is summed over")
    _check_sizes(node)
    if is_conv and Convolution(node).transposed:
        raise StaysFloat("torch has no transposed convolution of integers")
    if is_conv and (rhs.zero is not None or rhs.limits[1] > 127):
        raise StaysFloat("the zero point of its weight may be other than 0")
    why_not = multiplies_exactly(*_capability(node, lhs))
    if why_not:
        raise StaysFloat(why_not)


def _check_sizes(node: fx.Node) -> None:
    x, w = (each.meta["val"] for each in operands_of(node))
    summed = w.shape[1:] if node.target is aten.convolution.default else w.shape[:1]
    if not all(isinstance(size, int) for size in (*summed, *w.shape)):
        raise StaysFloat("the length of its sums is symbolic")
    if math.prod(summed) > LONGEST_SUM:
        raise StaysFloat(f"its sums of {math.prod(summed)} products may not fit int32")
    # torch._int_mm on CUDA: more than 16 rows, the other sizes multiples of 8.
    if x.device.type == "cuda" and (w.shape[0] % 8 or w.shape[1] % 8 or hint(x.shape[0]) <= 16):
        raise StaysFloat("CUDA multiplies integers of more than 16 rows and sizes that are multiples of 8 only")


def _capability(node: fx.Node, lhs: Operand) -> tuple[str, str, bool]:
    kind = "conv" if node.target is aten.convolution.default else "matmul"
    return kind, str(node.meta["val"].device), is_signed(node, lhs)


def _problem(node: fx.Node, lhs: Operand) -> Problem:
    x, w = (each.meta["val"] for each in operands_of(node))
    is_conv = node.target is aten.convolution.default
    return Problem(
        lhs=tuple(map(hint, x.shape)),
        rhs=tuple(w.shape),
        dtype=x.dtype,
        device=str(x.device),
        signed=is_signed(node, lhs),
        convolution=_window(node) if is_conv else None,
    )


def _window(node: fx.Node) -> Window:
    stride, padding, dilation = (tuple(map(hint, argument(node, name))) for name in ("stride", "padding", "dilation"))
    return stride, padding, dilation, Convolution(node).groups
