"""Floating-point operations of the products in a captured graph: two for each multiply-add."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.nodes import packet

aten = torch.ops.aten
Shape = Sequence[int]

# Products that have no kind in `fxquant.graph.kinds.KINDS`.
_OTHERS = frozenset(
    {
        *(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu, aten.bilinear, aten.addbmm, aten.addmv, aten.dot),
        *(aten.vdot, aten.inner, aten.tensordot, aten.linalg_multi_dot, aten.chain_matmul, aten._scaled_mm),
    }
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def is_product(node: fx.Node) -> bool:
    """Whether the node is an operator whose work `flops` or `attention_flops` counts."""
    return kind_of(node) is not None or packet(node) in _OTHERS or is_flex_attention(node)


def is_flex_attention(node: fx.Node) -> bool:
    """Whether the node is torch's ``flex_attention``, which placement leaves alone."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "flex_attention"


def flops(node: fx.Node) -> int:
    """Of one run of a product, attention excepted, by torch's own counter; 0 for operators that multiply nothing.

    Sizes are those of the example inputs. One that depends on the data counts as 1.
    """
    values = [one.meta["val"] for one in node.all_input_nodes]
    mixed = len({value.dtype for value in values if _is_float(value)}) > 1  # autocast casts them to one type as it runs
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: _sized(n.meta["val"]).float() if mixed and _is_float(n.meta["val"]) else _sized(n.meta["val"]),
    )
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTS) as counter:
        assert callable(node.target)
        node.target(*args, **kwargs)
    return int(counter.get_total_flops())


def attention_flops(node: fx.Node) -> tuple[int, int]:
    """Of query · keyᵀ, and of the probabilities · value; torch's counter knows no attention on CPU."""
    read = operands(node)
    # What has no schema, as flex_attention, begins with the three; one tensor may be all of them.
    three = [read[name] for name in ("query", "key", "value")] if read else node.args[:3]
    query, key, value = (_shape(one.meta["val"]) for one in three if isinstance(one, fx.Node))
    scores = 2 * math.prod(query[:-1]) * key[-2]
    return scores * query[-1], scores * value[-1]


def _sized(value: Any) -> Any:
    """Fake tensors of symbolic size as meta tensors of the example's, so that counting adds no guard."""
    if isinstance(value, Tensor):
        return torch.empty(_shape(value), dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return _size(value)
    return type(value)(map(_sized, value)) if isinstance(value, (tuple, list)) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _FLOATS


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(map(_size, value.shape))


def _size(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _contraction(matrix: int, *shapes: Any, out_shape: Any = None, **rest: Any) -> int:
    """Each number of the ``matrix``-th operand is multiplied once."""
    return 2 * math.prod(shapes[matrix])


def _added(_: Shape, lhs: Shape, rhs: Shape, *rest: Any, out_shape: Any = None, **keywords: Any) -> int:
    return 2 * math.prod(lhs) * rhs[-1]


def _bilinear(lhs: Shape, weight: Shape, rhs: Shape, *rest: Any, out_shape: Any = None, **keywords: Any) -> int:
    """``xᵀ W`` for each row of ``lhs``, and its result times ``rhs``, as torch's kernel does for each output."""
    outputs, first, second = weight[-3:]
    return 2 * math.prod(lhs[:-1]) * outputs * (first + 1) * second


# What torch's counter leaves out, by the operators that products become.
_COUNTS: dict[Any, Callable[..., int]] = {
    aten.mv: functools.partial(_contraction, 0),
    aten.addmv: functools.partial(_contraction, 1),
    aten.dot: functools.partial(_contraction, 0),
    aten.vdot: functools.partial(_contraction, 0),
    aten.addbmm: _added,
    aten._trilinear: _bilinear,
}
