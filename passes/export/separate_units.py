"""What a runtime would take for one unit with a float product is parted from it by a maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at
from fxquant.graph.edit import call
from fxquant.graph.kinds import operands, unit_end
from fxquant.graph.nodes import call_nodes, only_user, packet
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, negated
from fxquant.passes.export.pairs import CONVOLUTIONS, MATMULS, pair_before
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten

_WEIGHTED = CONVOLUTIONS | {aten.linear, aten.addmm}


@dataclass(frozen=True, kw_only=True)
class SeparateRelu(Pass):
    """``f(relu(matmul(x, y)))``  →  ``f(maximum(matmul(x, y), 0))``, where f is no quantizer.

    onnxruntime takes a MatMul and its Relu for one unit, looks for a QuantizeLinear after it, and leaves both in float
    where there is none; a maximum it takes for what it is.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces relus of products whose readers are not all quantizers."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if packet(node) is not aten.relu or all(user.target is QUANTIZE_DEQUANTIZE for user in node.users):
                continue
            (product,) = node.all_input_nodes
            if packet(product) in MATMULS:
                _as_maximum(gm, node, product)
                done += 1
        return done


@dataclass(frozen=True, kw_only=True)
class SeparateSums(Pass):
    """``matmul(DQ(x), DQ(w)) + α·y``  →  ``matmul(DQ(x), DQ(w)) − α·(−y)``, which has the same value to the bit.

    onnxruntime makes one float Gemm of a MatMul and an Add of whatever it can broadcast: a residual of a linear
    without a bias, ``x @ w + b``. Of a constant, what is subtracted is a constant too.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces sums of products that nothing else reads."""
        return sum(_subtract(gm, node) for node in list(call_nodes(gm.graph)) if packet(node) is aten.add)


def _subtract(gm: fx.GraphModule, node: fx.Node) -> bool:
    left, right, factor = argument_at(node, 0), argument_at(node, 1), argument(node, "alpha")
    if not _is_integer_product(left) and factor == 1:
        left, right = right, left
    if not _is_integer_product(left) or only_user(left) is not node or right is left:
        return False
    with gm.graph.inserting_before(node):
        minus = negated(gm, right) if isinstance(right, fx.Node) else -right
        kwargs = {} if factor == 1 else {"alpha": factor}
        apart = call(gm.graph, aten.sub.Tensor, left, minus, like=node, **kwargs)
    node.replace_all_uses_with(apart)
    gm.graph.erase_node(node)
    return True


def _is_integer_product(node: object) -> TypeGuard[fx.Node]:
    if not isinstance(node, fx.Node) or packet(node) not in MATMULS:
        return False
    return all(value.target is DEQUANTIZE or pair_before(value) is not None for value in operands(node).values())


@dataclass(frozen=True, kw_only=True)
class SeparateFloatWeights(Pass):
    """``QDQ(conv(QDQ(x), w))`` with w in float  →  ``QDQ(maximum(conv(QDQ(x), w), lowest))``; of a relu, its maximum.

    Between two quantizers onnxruntime rounds a float weight to 8 bits with one scale of its own making, even where it
    has no integer kernel and computes in float afterwards. The maximum changes no value and parts what it looks for.
    A BatchNorm between stays before the maximum, and becomes part of the convolution in the file.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Parts convolutions and linears of a quantized input and a float weight from their one reader."""
        return sum(_separate(gm, node) for node in list(call_nodes(gm.graph)) if packet(node) in _WEIGHTED)


def _separate(gm: fx.GraphModule, node: fx.Node) -> bool:
    named, end = operands(node), unit_end(node, frozenset())
    user = only_user(end)
    source, weight = named.get("input"), named.get("weight")
    if source is None or weight is None or user is None or weight.target is DEQUANTIZE or pair_before(source) is None:
        return False
    if packet(user) is aten.relu and any(reader.target is QUANTIZE_DEQUANTIZE for reader in user.users):
        _as_maximum(gm, user, end)
        return True
    if user.target is not QUANTIZE_DEQUANTIZE:
        return False
    with gm.graph.inserting_before(user):
        parted = _maximum(gm, end, torch.finfo(end.meta["val"].dtype).min, end)
    user.replace_input_with(end, parted)
    return True


def _as_maximum(gm: fx.GraphModule, relu: fx.Node, value: fx.Node) -> None:
    with gm.graph.inserting_before(relu):
        relu.replace_all_uses_with(_maximum(gm, value, 0.0, relu))
    gm.graph.erase_node(relu)


def _maximum(gm: fx.GraphModule, value: fx.Node, least: float, like: fx.Node) -> fx.Node:
    bound = torch.full((), least, dtype=like.meta["val"].dtype)
    return call(gm.graph, aten.maximum.default, value, constant(gm, f"{like.name}_least", bound, like), like=like)
