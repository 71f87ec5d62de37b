"""Reading an ATen training graph: op kinds and their operands, module frames, units, uses.

Everything here answers questions about a graph and changes nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxquant.ops.binding import BIND

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

# Ops that move values and compute none: a per-tensor quantizer commutes with them. Those that cut a tensor
# into parts (split, select, slice) are left out: the parts deserve ranges of their own.
AGNOSTIC = frozenset(
    {
        *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
        *(aten.permute, aten.transpose, aten.t, aten.mT, aten.contiguous, aten.clone, aten.expand, aten.alias),
        *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d),
    }
)
# Pads whose values are those of the tensor, or zeros, which every format holds: see `is_agnostic`.
PADS = frozenset(
    {
        *(aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
        *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
    }
)
ZEROS = frozenset({aten.zeros, aten.zeros_like, aten.new_zeros})
DROPOUT = frozenset({aten.dropout, aten.feature_dropout})
_RELU6 = frozenset({aten.relu6, aten.hardtanh, aten.clamp})


def packet(node: fx.Node) -> Any:
    """The node's OpOverloadPacket, or its target where it is no ATen call."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


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


def is_agnostic(node: fx.Node) -> bool:
    """Moves values only; dropout counts where it is switched off, and a pad that adds zeros or repeats values."""
    if node.op != "call_function":
        return False
    if packet(node) is aten.slice:  # ``x[:]``, which is traced only where the size is symbolic
        given = list(node.args[2:])
        return all(value in whole for value, whole in zip(given, ((None, 0), (None, sys.maxsize), (1,)), strict=False))
    if packet(node) in PADS:
        value = node.args[3:] if packet(node) is aten.pad else node.args[2:]
        return not any((*value, node.kwargs.get("value")))
    return packet(node) in AGNOSTIC or (packet(node) in DROPOUT and node.args[2] is False)


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def activation_name(node: fx.Node) -> str | None:
    """``"relu"`` or ``"relu6"`` for those functions however spelled, else None."""
    name = packet(node) if node.op == "call_function" else None
    if name is aten.relu or (name in (aten.clamp, aten.clamp_min) and tuple(node.args[1:]) in ((0,), (0, None))):
        return "relu"
    if name is aten.relu6 or (name in _RELU6 and tuple(node.args[1:3]) == (0, 6)):
        return "relu6"
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def unit_end(node: fx.Node, fuses: frozenset[str]) -> fx.Node:
    """Last node of the unit that ``node`` heads: itself, its BatchNorm, its fused activation."""
    end = node
    user = only_user(end)
    if user is not None and packet(user) is aten.batch_norm and user.args[0] is end:
        end, user = user, only_user(user)
    if user is not None and activation_name(user) in fuses:
        end = user
    return end


# ---------------------------------------------------------------- module frames

_BOUND = re.compile(r"\.forward(?:\.__self__)?\.module(?=\.|$)")
_MEMBER = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")
_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_CALL = re.compile(r"@\d+")


def normalize_path(path: str) -> str:
    """Dynamo's or export's spelling of a module path as dotted names: ``L['self'].module.a[0]`` → ``….a.0``."""
    root = _ROOT.match(path)
    head, tail = (root.group(), path[root.end() :]) if root else ("", path)
    tail = _BOUND.sub("", tail)
    tail = _MEMBER.sub(lambda m: "." + (m.group(1) or m.group(2) or m.group(3)), tail)
    return head + _CALL.sub("", tail)


@dataclass(frozen=True)
class Frame:
    """One call of one module as a graph shows it: ``key`` tells calls apart, ``path`` modules."""

    key: str
    path: str


def frames(node: fx.Node) -> tuple[Frame, ...]:
    """The module calls around a node, outermost first; empty for code of the compiled frame itself."""
    stack = node.meta.get("nn_module_stack") or {}
    found = (Frame(key, normalize_path(path)) for key, (path, _) in stack.items())
    return tuple(frame for frame in found if frame.path)


def relative(path: str, owner: str) -> str:
    """``path`` as seen from ``owner`` (its own path: the empty string)."""
    return path[len(owner) :].lstrip(".") if path.startswith(owner) else path


def root_path(graph: fx.Graph) -> str:
    """The path prefix of the frame that was compiled, as module paths inside it spell it."""
    for node in graph.nodes:
        source = node.meta.get("source", "") if node.op == "placeholder" else ""
        head = re.split(r"\._(?:modules|parameters|buffers)\[", source, maxsplit=1)
        if len(head) == 2:
            return normalize_path(head[0])
    return ""


def is_bind(node: fx.Node) -> bool:
    """Whether the node marks the frame of an owner."""
    return node.op == "call_function" and node.target is BIND


_LIBRARIES = (str(Path(inspect.getfile(torch)).parent), str(Path(__file__).parent))


def user_line(node: fx.Node) -> str:
    """``file:line`` of the innermost code that made the node and is neither torch's nor ours; else empty."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [line for line in lines if not line[0].startswith(_LIBRARIES)]
    return "{}:{}".format(*own[-1]) if own else ""


# ---------------------------------------------------------------- data dependence


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters, buffers and constants only: what weights may be."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "placeholder" and is_state(node)):
            found.add(node)
            continue
        inputs = node.all_input_nodes if node.op == "call_function" and not is_bind(node) else []
        if found.issuperset(inputs) and (inputs or packet(node) is aten.full):
            found.add(node)
    return found


def unmoved(value: fx.Node, moves: Callable[[fx.Node], bool] = is_agnostic) -> fx.Node:
    """The tensor that a value is, moved at most."""
    while moves(value):
        value = value.all_input_nodes[0]
    return value


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


def weight_computations(graph: fx.Graph, constants: set[fx.Node]) -> set[fx.Node]:
    """The constants that nothing but weights, and buffers, are computed from: what parametrizations run.

    A deployed model holds their results; a product among them is none of its products.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in constants and all(user in found or _reads_as_weight(user, node) for user in node.users):
            found.add(node)
    return found


def _reads_as_weight(user: fx.Node, value: fx.Node) -> bool:
    kind = kind_of(user)
    reading = [name for name, operand in operands(user).items() if operand is value]
    return kind is not None and kind.weight is not None and reading == [kind.weight]


def same_views(graph: fx.Graph, constants: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Constant → the first node that holds the same view of the same tensor: ``w.t()`` written twice is one."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in constants:
            is_view = packet(node) in AGNOSTIC and len(node.all_input_nodes) == 1
            base = first[node.all_input_nodes[0]] if is_view else node
            first[node] = seen.setdefault((node.target, base, repr(node.args[1:])), node) if is_view else node
    return first


def shares_memory(node: fx.Node) -> bool:
    """Whether the node's value may be a view of its first operand (or that operand itself)."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # an item of several results, or a nested graph
    return packet(node) in DROPOUT or any(r.alias_info is not None for r in node.target._schema.returns)


def changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that are read again after they, or a view of them, were changed in place."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}
    changes: dict[fx.Node, list[int]] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        memory[node] = memory[inputs[0]] if shares_memory(node) and inputs else node
        for changed in _changes(node):
            changes.setdefault(memory[changed], []).append(order[node])
    found = set()
    for node in graph.nodes:
        after = next((i for i in changes.get(memory[node], ()) if i > order[node]), None)
        if after is not None and any(order[user] > after for user in node.users):
            found.add(node)
    return found


def _changes(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return [a for a, write in zip(node.args, written, strict=False) if write and isinstance(a, fx.Node)]


def is_state(node: fx.Node) -> bool:
    """Whether a placeholder holds a parameter or buffer; capture marks those."""
    return bool(node.meta.get("state"))


def call_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The call_function nodes in order."""
    return (node for node in graph.nodes if node.op == "call_function")
