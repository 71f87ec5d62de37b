"""Operator kinds and their operands, as placement knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.arguments import argument, argument_at, name_at, set_argument
from fxquant.graph.nodes import only_user, packet
from fxquant.graph.views import BatchNorm

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """What an operator is to placement: its name and where its operands stand in the arguments.

    ``operands`` maps operand name → argument index. ``weight`` names the operand that may be a parameter, and
    ``weight_axis`` its output-channel axis (None: no such axis, one scale for the tensor). The operands of a recurrent
    layer are its weights, by torch's names (``"weight_hh_l0"``).
    """

    name: str
    operands: dict[str, int]
    weight: str | None = None
    weight_axis: int | None = None

    def is_weight(self, name: str) -> bool:
        """Whether an operand may be a parameter."""
        return name == self.weight or self.name in _RECURRENT


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
    aten.lstm: Kind("lstm", {}, None, 0),
    aten.gru: Kind("gru", {}, None, 0),
    **dict.fromkeys((aten.rnn_tanh, aten.rnn_relu), Kind("rnn", {})),
    aten.einsum: Kind("einsum", {}),
    **dict.fromkeys((aten.embedding, aten.embedding_bag), Kind("embedding", {"weight": 0}, "weight", None)),
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

_LISTS = ("einsum", "cat")  # kinds whose operands are a list
_RECURRENT = ("lstm", "gru")  # whole layers
# The tensors of one direction of one layer in ``params``, by how many there are: as nn.RNNBase has them.
_OF_LAYER = {
    2: ("weight_ih", "weight_hh"),
    3: ("weight_ih", "weight_hh", "weight_hr"),
    4: ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    5: ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"),
}
_NAMED = {aten.relu: "relu", aten.relu6: "relu6"}
_BETWEEN = {(0, None): "relu", (0, 6): "relu6"}


def kind_of(node: fx.Node) -> Kind | None:
    """The node's kind, None for ops that placement does not know."""
    if node.op != "call_function":
        return None
    kind = KINDS.get(packet(node))
    if kind is _CONV and packet(node) is aten.convolution and argument(node, "transposed"):
        return KINDS[aten.conv_transpose2d]
    if kind is _ADD and not all(isinstance(argument_at(node, index), fx.Node) for index in (0, 1)):
        return None
    return kind


def operands(node: fx.Node) -> dict[str, fx.Node]:
    """Operand name → node, for the operands that a quantizer could stand on."""
    kind = kind_of(node)
    if kind is None:
        return {}
    if kind.name in _LISTS:
        listed = argument(node, "tensors")
        return {f"operand{i}": n for i, n in enumerate(listed) if isinstance(n, fx.Node)}
    if kind.name in _RECURRENT:
        listed = argument(node, "params")
        return {name: listed[index] for name, index in _weights_of_layers(node).items()}
    values = {name: argument_at(node, index) for name, index in kind.operands.items()}
    return {name: value for name, value in values.items() if isinstance(value, fx.Node)}


def _weights_of_layers(node: fx.Node) -> dict[str, int]:
    """Weight → where it stands in ``params`` of a recurrent layer."""
    listed, layers = argument(node, "params"), argument(node, "num_layers")
    directions = ("", "_reverse") if argument(node, "bidirectional") else ("",)
    kinds = _OF_LAYER[len(listed) // (layers * len(directions))]
    names = [f"{kind}_l{layer}{way}" for layer in range(layers) for way in directions for kind in kinds]
    return {name: index for index, name in enumerate(names) if name.startswith("weight")}


def replace_operand(node: fx.Node, name: str, new: fx.Node) -> None:
    """Puts ``new`` in the place of one operand; the same tensor in another operand stays."""
    kind = kind_of(node)
    assert kind is not None
    if kind.name in _LISTS:
        listed = list(argument(node, "tensors"))
        listed[int(name.removeprefix("operand"))] = new
        set_argument(node, "tensors", listed)
    elif kind.name in _RECURRENT:
        listed = list(argument(node, "params"))
        listed[_weights_of_layers(node)[name]] = new
        set_argument(node, "params", listed)
    else:
        set_argument(node, name_at(node, kind.operands[name]), new)


def activation_name(node: fx.Node) -> str | None:
    """``"relu"`` or ``"relu6"`` for those functions however spelled, else None."""
    name = packet(node) if node.op == "call_function" else None
    if name in _NAMED:
        return _NAMED[name]
    if name is aten.clamp_min:
        return "relu" if argument(node, "min") == 0 else None
    if name is aten.clamp or name is aten.hardtanh:
        return _BETWEEN.get((argument_at(node, 1), argument_at(node, 2)))
    return None


def unit_end(node: fx.Node, fuses: frozenset[str]) -> fx.Node:
    """Last node of the unit that ``node`` heads: itself, its BatchNorm, its fused activation."""
    end = node
    user = only_user(end)
    norm = BatchNorm.of(user)
    if user is not None and norm is not None and norm.input is end:
        end, user = user, only_user(user)
    if user is not None and activation_name(user) in fuses:
        end = user
    return end


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a convolution or linear."""
    bias = argument(node, "bias")
    return bias if isinstance(bias, fx.Node) else None


def set_bias(node: fx.Node, bias: fx.Node | None) -> None:
    """Gives a convolution or linear another bias, or none."""
    set_argument(node, "bias", bias)
