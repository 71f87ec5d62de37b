"""Forward products of two fake-quantized tensors as products of their codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.graph.arguments import argument, argument_at, has_argument
from fxquant.graph.edit import call
from fxquant.graph.moves import CASTING, KEEPING, SHAPING, TURNING, ZEROS
from fxquant.graph.nodes import packet
from fxquant.graph.views import AffineQparams, Convolution, FakeQuant, qparams_of
from fxquant.numerics import integer
from fxquant.ops.fake_quantize import PER_CHANNEL
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION, LONGEST_SUM, multiplies_exactly
from fxquant.ops.quantize import QUANTIZE_CHANNEL, QUANTIZE_TENSOR
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint.product_times import Problem, times

IntegerMatmul = bool | Literal["auto"]
aten = torch.ops.aten

# product → where its operands and its bias stand
_PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.bmm.default: (0, 1, None),
    aten.baddbmm.default: (1, 2, 0),
    aten.convolution.default: (0, 1, 2),
}

_SEEN_THROUGH = KEEPING | TURNING | SHAPING | CASTING

# What new nodes take over: the partitioner reads the tags, and whose checkpoint region they lie in.
_KEPT = ("stack_trace", "nn_module_stack", "original_aten", "partitioner_tag", "recompute", "ac_graph_id")

# The integer product must be this much faster, so that noise in the times does not choose it where nothing is gained.
_MARGIN = 1.1


@dataclass(frozen=True)
class _Operand:
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
        return self.quant.node

    @property
    def limits(self) -> tuple[int, int]:
        return self.quant.quant_min, self.quant.quant_max


class _Declined(Exception):
    """Why a product of two fake-quantized tensors stays float."""


@dataclass(frozen=True, kw_only=True)
class UseIntegerMatmul(Pass):
    """Joint graph: ``addmm(b, FQ(x, s, z), FQ(w, t))``  →  ``float(_int_mm(q(x), q(w)) − z·Σq(w)) · (s·t) + b``.

    ``mm``, ``addmm`` and, on CPU, ``convolution``, whose operands are fake-quants of at most 8 bits, seen through
    views, transposes and casts. Forward only: the gradient reads the fake-quants, which stay, so that it is that of the
    same values. The codes are those of the fake-quants, and the sums are exact, so the result is what an integer
    kernel gives; a float product differs from it by the rounding of its own sums.

    ``mode`` True takes integers wherever that is possible. "auto" takes them where they are faster, by times measured
    here, once per shape (`product_times`), for a symbolic size at its hint. What was decided otherwise elsewhere and
    comes from a cache computes the same sums, at the speed that was measured then.

    Nodes keep the tags of what they replace; codes those of their fake-quants.
    """

    mode: IntegerMatmul = "auto"
    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] | None = field(default=None, repr=False)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces forward products; declines name those of two quantized tensors that stay."""
        rewriter = _Rewriter(gm.graph, None if self.decompositions is None else dict(self.decompositions()))
        done = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in _PRODUCTS or _is_backward(node):
                continue
            first, second, _ = _PRODUCTS[node.target]
            operands = tuple(_origin(argument_at(node, index)) for index in (first, second))
            if not all(_is_fake_quantize(source) for source, _ in operands):
                continue
            try:
                lhs, rhs = (_operand(*each) for each in operands)
                _check(node, lhs, rhs)
                self._weigh(node, lhs)
            except _Declined as reason:
                self.decline(result, node, f"float product: {reason}")
            else:
                rewriter.replace(node, lhs, rhs)
                done += 1
        return done

    def uuid(self) -> str:
        """With the processor's instructions, by which it is known whether integer kernels are exact."""
        return f"{super().uuid()}-{torch.backends.cpu.get_cpu_capability()}"

    def _weigh(self, node: fx.Node, lhs: _Operand) -> None:
        if self.mode != "auto":
            return
        found = times(_problem(node, lhs))
        if found.integer * _MARGIN > found.floating:
            raise _Declined(f"integers take {found.integer / found.floating:.2f} of its time here, as measured")


def _is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def _is_fake_quantize(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("fxquant.fake_quantize")


def _origin(value: Any) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node whose values an operand holds, and what moves them, from there on."""
    moves: list[fx.Node] = []
    while value.op == "call_function" and packet(value) in _SEEN_THROUGH and value.meta["val"].is_floating_point():
        source = argument_at(value, 0)
        if not isinstance(source, fx.Node) or not source.meta["val"].is_floating_point():
            break
        moves.append(value)
        value = source
    return value, tuple(reversed(moves))


def _operand(source: fx.Node, moves: tuple[fx.Node, ...]) -> _Operand:
    quant = FakeQuant.of(source)
    if quant is None:
        raise _Declined(f"{packet(source)} is no affine quantizer")
    if not isinstance(quant.zero_point, fx.Node):
        raise _Declined(f"the scale of {source.name} is a number")
    if source.meta["val"].dtype == torch.float64:
        raise _Declined(f"{source.name} is float64")
    if quant.zero_point.meta["val"].is_floating_point():
        raise _Declined(f"the zero point of {source.name} is no integer")
    axis = None if quant.axis is None else _axis_behind(source, quant.axis, moves)
    found = _Operand(quant, moves, axis, None if _is_zero(quant.zero_point) else quant.zero_point)
    low, high = found.limits
    if low < -128 or high > 255 or (low < 0 and high > 127):
        raise _Declined(f"the codes of {source.name} have more than 8 bits: [{low}, {high}]")
    return found


def _axis_behind(source: fx.Node, axis: int, moves: Sequence[fx.Node]) -> int:
    """The dimension that the channels of a fake-quant, its ``axis``, have behind what moves them."""
    for node in moves:
        name, dims = packet(node), node.meta["val"].dim()
        if name is aten.t or name is aten.transpose:
            pair = (0, dims - 1) if name is aten.t else _turned([argument_at(node, i) for i in (1, 2)], dims)
            axis = pair[1 - pair.index(axis)] if axis in pair else axis
        elif name is aten.permute:
            axis = _turned(argument(node, "dims"), dims).index(axis)
        elif name not in KEEPING | CASTING:
            raise _Declined(f"{node.name} moves the channels of {source.name}")
    return axis


def _turned(dims: Any, count: int) -> tuple[int, ...]:
    return tuple(dim % count for dim in dims)


def _is_zero(point: Any) -> bool:
    """Whether a zero point is 0 whatever the data."""
    if not isinstance(point, fx.Node) or point.op != "call_function":
        return False
    if packet(point) is aten.full or packet(point) is aten.full_like:
        return bool(argument(point, "fill_value") == 0)
    if packet(point) in KEEPING | SHAPING:
        return _is_zero(argument_at(point, 0))
    made = qparams_of(point)
    if isinstance(made, AffineQparams):
        return made.symmetric is True and made.quant_min < 0
    return packet(point) in ZEROS or made is not None


def _check(node: fx.Node, lhs: _Operand, rhs: _Operand) -> None:
    """Raises _Declined for products that no integer kernel does."""
    if packet(node) in (aten.bmm, aten.baddbmm):
        raise _Declined("torch has no product of batches of integer matrices")
    if any(has_argument(node, factor) and argument(node, factor) != 1 for factor in ("alpha", "beta")):
        raise _Declined("it is scaled by alpha or beta")
    is_conv = node.target is aten.convolution.default
    outer = (None, 0) if is_conv else (0, 1)
    for operand, allowed in zip((lhs, rhs), outer, strict=True):
        if operand.axis is not None and operand.axis != allowed:
            raise _Declined(f"{operand.source.name} has a scale per channel of a dimension that is summed over")
    _check_sizes(node, lhs)
    if is_conv and Convolution(node).transposed:
        raise _Declined("torch has no transposed convolution of integers")
    if is_conv and (rhs.zero is not None or rhs.limits[1] > 127):
        raise _Declined("the zero point of its weight may be other than 0")
    why_not = multiplies_exactly(*_capability(node, lhs))
    if why_not:
        raise _Declined(why_not)


def _multiplied(node: fx.Node) -> tuple[Tensor, Tensor]:
    """The fake values of a product's operands."""
    first, second, _ = _PRODUCTS[node.target]
    return _value(argument_at(node, first)), _value(argument_at(node, second))


def _check_sizes(node: fx.Node, lhs: _Operand) -> None:
    x, w = _multiplied(node)
    summed = w.shape[1:] if node.target is aten.convolution.default else w.shape[:1]
    if not all(isinstance(size, int) for size in (*summed, *w.shape)):
        raise _Declined("the length of its sums is symbolic")
    if math.prod(summed) > LONGEST_SUM:
        raise _Declined(f"its sums of {math.prod(summed)} products may not fit int32")
    # torch._int_mm on CUDA: more than 16 rows, the other sizes multiples of 8.
    if x.device.type == "cuda" and (w.shape[0] % 8 or w.shape[1] % 8 or _hint(x.shape[0]) <= 16):
        raise _Declined("CUDA multiplies integers of more than 16 rows and sizes that are multiples of 8 only")


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _is_signed(node: fx.Node, lhs: _Operand) -> bool:
    """Whether the left codes are int8: on CPU uint8 has a kernel too, and is the only one of convolutions."""
    if node.target is aten.convolution.default:
        return False
    return node.meta["val"].device.type == "cuda" or lhs.limits[0] < 0


def _capability(node: fx.Node, lhs: _Operand) -> tuple[str, str, bool]:
    kind = "conv" if node.target is aten.convolution.default else "matmul"
    return kind, str(node.meta["val"].device), _is_signed(node, lhs)


def _problem(node: fx.Node, lhs: _Operand) -> Problem:
    x, w = _multiplied(node)
    convolution, conv = None, Convolution.of(node)
    if conv is not None:
        stride, padding, dilation = (
            tuple(map(_hint, argument(node, name))) for name in ("stride", "padding", "dilation")
        )
        convolution = stride, padding, dilation, conv.groups
    return Problem(
        lhs=tuple(map(_hint, x.shape)),
        rhs=tuple(w.shape),
        dtype=x.dtype,
        device=str(x.device),
        signed=_is_signed(node, lhs),
        convolution=convolution,
    )


class _Rewriter:
    """Puts products of codes into a graph, the codes of a fake-quant once."""

    def __init__(self, graph: fx.Graph, table: Mapping[Any, Callable[..., Any]] | None) -> None:
        self.graph = graph
        self.table = None if table is None else dict(table)
        self.codes: dict[tuple[fx.Node, bool], tuple[fx.Node, fx.Node | None]] = {}
        self.bodies: dict[tuple[object, ...], fx.Graph] = {}

    def replace(self, node: fx.Node, lhs: _Operand, rhs: _Operand) -> None:
        """The product ``node`` from codes; what it read goes where nothing else reads it."""
        with self.graph.inserting_before(node):
            x, x_zero = self._moved_codes(lhs, _is_signed(node, lhs))
            w, w_zero = self._moved_codes(rhs, True)
            inputs = {"lhs": x, "rhs": w, "lhs_scale": lhs.source.args[1], "rhs_scale": rhs.source.args[1]}
            place = _PRODUCTS[node.target][2]
            bias = None if place is None else node.args[place]
            inputs |= {k: v for k, v in (("lhs_zero", x_zero), ("rhs_zero", w_zero), ("bias", bias)) if v is not None}
            new = self._insert(_kernel(node), inputs, node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        for each in dict.fromkeys((*reversed(rhs.moves), rhs.source, *reversed(lhs.moves), lhs.source)):
            if not each.users:
                self.graph.erase_node(each)

    def _moved_codes(self, operand: _Operand, signed: bool) -> tuple[fx.Node, fx.Node | None]:
        """The codes where the operand has its values, and their zero point."""
        code, zero = self._codes(operand, signed)
        for node in operand.moves:
            if packet(node) not in CASTING:
                code = self._call(node.target, code, *node.args[1:], like=node, **node.kwargs)
        return code, zero

    def _codes(self, operand: _Operand, signed: bool) -> tuple[fx.Node, fx.Node | None]:
        source, (low, high) = operand.source, operand.limits
        if (source, signed) not in self.codes:
            shift = -128 if signed and high > 127 else 128 if not signed and low < 0 else 0
            point, zero = source.args[2], operand.zero
            if shift:
                point = zero = self._call(aten.add.Tensor, point, shift, like=source)
            op = QUANTIZE_CHANNEL if source.target is PER_CHANNEL else QUANTIZE_TENSOR
            # As SaveQuantizedActivations writes it, so that equal codes are computed once.
            limits = (low + shift, high + shift, torch.int8 if signed else torch.uint8)
            rounding = source.kwargs.get("rounding", "reciprocal")
            inputs = (*source.args[:2], point, *source.args[3:-2], *limits)
            self.codes[source, signed] = self._call(op, *inputs, rounding=rounding, like=source), zero
        return self.codes[source, signed]

    def _call(self, op: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        node = call(self.graph, op, *args, like=like, **kwargs)
        _keep_tags(node, like)
        return node

    def _insert(self, kernel: partial[Tensor], inputs: Mapping[str, Any], like: fx.Node) -> fx.Node:
        """The nodes that ``kernel`` traces to on ``inputs``, tagged as ``like``; the last of them."""
        nodes = list(inputs.values())
        shapes = tuple((v.dtype, v.device, str(tuple(v.shape)), str(v.stride())) for v in map(_value, nodes))
        key = (kernel.func, str(kernel.keywords), tuple(inputs), shapes)
        if key not in self.bodies:
            self.bodies[key] = _traced(kernel, inputs, self.table)
        mapped = dict(zip(self.bodies[key].find_nodes(op="placeholder"), nodes, strict=True))
        for inner in self.bodies[key].nodes:
            if inner.op == "output":
                return mapped[inner.args[0]]
            if inner.op != "placeholder":
                mapped[inner] = self.graph.node_copy(inner, mapped.__getitem__)
                _keep_tags(mapped[inner], like)
        raise AssertionError("a traced graph has an output")


def _value(node: fx.Node) -> Tensor:
    return node.meta["val"]


def _keep_tags(node: fx.Node, like: fx.Node) -> None:
    node.meta.update({key: like.meta[key] for key in _KEPT if key in like.meta})


def _traced(
    kernel: partial[Tensor], inputs: Mapping[str, fx.Node], table: dict[Any, Callable[..., Any]] | None
) -> fx.Graph:
    values = [_value(node) for node in inputs.values()]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    assert mode is not None, "a joint graph holds fake tensors"

    def positional(*tensors: Tensor) -> Tensor:
        return kernel(**dict(zip(inputs, tensors, strict=True)))

    with mode:
        return make_fx(positional, decomposition_table=table)(*values).graph


def _kernel(node: fx.Node) -> partial[Tensor]:
    dtype = node.meta["val"].dtype
    if node.target is not aten.convolution.default:
        return partial(integer.matmul, dtype=dtype)
    stride, padding, dilation, groups = (node.args[i] for i in (3, 4, 5, 8))
    where = (stride, padding, dilation, groups)
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
