"""Operator kinds and their operands, as placement knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.nodes import only_user, packet

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """What an operator is to placement: its name and where its operands stand in the arguments.

    ``operands`` maps operand name → argument index. ``weight`` names the operand that may be a parameter, and
    ``weight_axis`` its output-channel axis (None: no such axis, one scale for the tensor).
    """

    name: str
    operands: dict[str, int]
    weight: str | None = None
    weight_axis: int | None = None


_CONV = Kind("conv", {"input": 0, "weight": 1}, "weight", 0)
_MATMUL = Kind("matmul", {"lhs": 0, "rhs": 1}, "rhs", -1)
_POOL = Kind("avg_pool", {"input": 0})
_ADD = Kind("add", {"lhs": 0, "rhs": 1})

KINDS: dict[Any, Kind] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution), _CONV),
    **dict.fromkeys(
        (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
        Kind("conv_transpose", {"input": 0, "weight": 1}, "weight", 1),
    ),
    aten.linear: Kind("linear", {"input": 0, "weight": 1}, "weight", 0),
    aten.addmm: Kind("linear", {"input": 1, "weight": 2}, "weight", -1),
    **dict.fromkeys((aten.matmul, aten.bmm, aten.mm), _MATMUL),
    aten.baddbmm: Kind("matmul", {"lhs": 1, "rhs": 2}, "rhs", -1),
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), Kind("mv", {"lhs": 0, "rhs": 1})),
    aten.addmv: Kind("mv", {"lhs": 1, "rhs": 2}),
    aten.bilinear: Kind("bilinear", {}),
    **dict.fromkeys((aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu), Kind("recurrent_layer", {})),
    aten.einsum: Kind("einsum", {}),
    aten.embedding: Kind("embedding", {"weight": 0}, "weight", None),
    aten.scaled_dot_product_attention: Kind("sdpa", {"query": 0, "key": 1, "value": 2}),
    aten.add: _ADD,
    aten.cat: Kind("cat", {}),
    aten.concat: Kind("cat", {}),
    **dict.fromkeys(
        (
            *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d),
            *(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d),
        ),
        _POOL,
    ),
}

_RELU6 = frozenset({aten.relu6, aten.hardtanh, aten.clamp})


def kind_of(node: fx.Node) -> Kind | None:
    """The node's kind, None for ops that placement does not know."""
    if node.op != "call_function":
        return None
    kind = KINDS.get(packet(node))
    if kind is _CONV and packet(node) is aten.convolution and node.args[6]:
        return KINDS[aten.conv_transpose2d]
    if kind is _ADD and (len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2])):
        return None
    return kind


def operands(node: fx.Node) -> dict[str, fx.Node]:
    """Operand name → node, for the operands that a quantizer could stand on."""
    kind = kind_of(node)
    if kind is None:
        return {}
    if kind.name in ("einsum", "cat"):
        listed = node.args[1] if kind.name == "einsum" else node.args[0]
        return {f"operand{i}": n for i, n in enumerate(listed) if isinstance(n, fx.Node)}  # type: ignore[arg-type]
    found = {}
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, index in kind.operands.items():
        value = node.args[index] if index < len(node.args) else node.kwargs.get(names[index])
        if isinstance(value, fx.Node):
            found[name] = value
    return found


def replace_operand(node: fx.Node, name: str, new: fx.Node) -> None:
    """Puts ``new`` in the place of one operand; the same tensor in another operand stays."""
    kind = kind_of(node)
    assert kind is not None
    if kind.name in ("einsum", "cat"):
        index = 1 if kind.name == "einsum" else 0
        listed = list(node.args[index])  # type: ignore[arg-type]
        listed[int(name.removeprefix("operand"))] = new
        node.update_arg(index, listed)
        return
    index = kind.operands[name]
    if index < len(node.args):
        node.update_arg(index, new)
    else:
        node.update_kwarg(node.target._schema.arguments[index].name, new)  # type: ignore[union-attr]


def activation_name(node: fx.Node) -> str | None:
    """``"relu"`` or ``"relu6"`` for those functions however spelled, else None."""
    name = packet(node) if node.op == "call_function" else None
    if name is aten.relu or (name in (aten.clamp, aten.clamp_min) and tuple(node.args[1:]) in ((0,), (0, None))):
        return "relu"
    if name is aten.relu6 or (name in _RELU6 and tuple(node.args[1:3]) == (0, 6)):
        return "relu6"
    return None


def unit_end(node: fx.Node, fuses: frozenset[str]) -> fx.Node:
    """Last node of the unit that ``node`` heads: itself, its BatchNorm, its fused activation."""
    end = node
    user = only_user(end)
    if user is not None and packet(user) is aten.batch_norm and user.args[0] is end:
        end, user = user, only_user(user)
    if user is not None and activation_name(user) in fuses:
        end = user
    return end


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a convolution or linear."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None


def set_bias(node: fx.Node, bias: fx.Node | None) -> None:
    """Gives a convolution or linear another bias, or none."""
    if len(node.args) > 2:
        node.update_arg(2, bias)
    elif bias is not None or "bias" in node.kwargs:
        node.update_kwarg("bias", bias)
