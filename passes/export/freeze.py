"""From scales that are computed to scales that are constants: weights become integers, activations labelled Q/DQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import numerics
from fxquant.errors import ExportError
from fxquant.graph.dependence import constant_nodes
from fxquant.graph.edit import call
from fxquant.graph.kinds import bias_of, kind_of, operands
from fxquant.graph.moves import unmoved
from fxquant.numerics.storage import storage
from fxquant.ops import fake_quantize
from fxquant.ops.bias import BIAS_MAX, FAKE_QUANTIZE_BIAS, bias_codes
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE


@dataclass
class Frozen:
    """What freezing found: sites by role, and what it had to adjust."""

    weights: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)  # no QuantizeLinear of their own: constants, equals of others


class _Values:
    """Real values of nodes that depend on parameters and buffers only, computed at most once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.constants = constant_nodes(gm.graph)
        self.known: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node.op == "get_attr":
                value: Any = self.gm
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                self.known[node] = value.detach()
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.__getitem__)
                self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.known[node]


@torch.no_grad()
def freeze(gm: fx.GraphModule) -> Frozen:
    """Replaces every fake-quant node of an inference graph, in place.

    ``fake_quantize(w, s, z)`` of a constant  →  ``dequantize_affine(int8 codes, s, z)``
    ``reshape(fake_quantize(reshape(w)))``    →  the same with a block of codes for each group, in the form of w
    ``fake_quantize(x, s, z)``                →  ``quantize_dequantize(x, 0.1, 128, …, "layer.input")``
    ``fake_quantize_bias(b, s, t)``           →  ``dequantize_affine(int32 codes, s·t, 0)``

    Everything else that depends on parameters only and feeds something that does not (a folded bias) becomes a
    constant too.
    """
    values = _Values(gm)
    frozen = Frozen(absorbed=[label for node in gm.graph.nodes for label in node.meta.get("stands_for", ())])
    seen: dict[str, int] = {}
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in fake_quantize.FAKE_QUANTIZE]
    for node in sorted(nodes, key=lambda n: n.args[0] in values.constants):  # activations first: biases need scales
        site = node.meta["site"]
        if node.args[0] in values.constants and site.spec.group_size is not None:
            _freeze_groups(gm, node, values, frozen)
        elif node.args[0] in values.constants:
            _freeze_weight(gm, node, site.label, values, frozen)
        else:
            number = seen[site.label] = seen.get(site.label, -1) + 1
            label = site.label if not number else f"{site.label}@{number}"
            _freeze_activation(gm.graph, node, label, values, frozen)
    for node in [n for n in gm.graph.nodes if n.op == "call_function" and n.target is FAKE_QUANTIZE_BIAS]:
        _freeze_bias(gm, node, values)
    _freeze_rest(gm, values)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return frozen


def _freeze_activation(graph: fx.Graph, node: fx.Node, label: str, values: _Values, frozen: Frozen) -> None:
    source, scale, zero_point, quant_min, quant_max = node.args
    if scale not in values.constants:
        raise ExportError(
            f"scale of {label} must not depend on the input: its range follows each batch. Prepare the model with "
            "ranges='moving_average', or fxquant.override this site with a Fixed range."
        )
    with graph.inserting_before(node):
        numbers = (float(values[scale]), int(values[zero_point]))  # type: ignore[index]
        new = call(graph, QUANTIZE_DEQUANTIZE, source, *numbers, quant_min, quant_max, label, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    frozen.activations.append(label)


def _freeze_weight(gm: fx.GraphModule, node: fx.Node, label: str, values: _Values, frozen: Frozen) -> None:
    weight, scale, zero_point = (values[n] for n in node.args[:3])  # type: ignore[index]
    per_channel = node.target is fake_quantize.PER_CHANNEL
    axis: int | None = node.args[3] if per_channel else None  # type: ignore[assignment]
    scale = _guard_bias(node, scale, values, label, frozen)
    code = _codes(node, weight, scale, zero_point, axis)
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    with gm.graph.inserting_before(node):
        held = _held(gm, label, (code, scale, zero_point), node)
        new = call(gm.graph, DEQUANTIZE, *held, axis, like=node)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    if node.meta["site"].role == "weight":
        frozen.weights.append(label)
    else:  # of a learned query, as an example: stored as a weight is
        frozen.activations.append(label)
        frozen.absorbed.append(label)


def _freeze_groups(gm: fx.GraphModule, node: fx.Node, values: _Values, frozen: Frozen) -> None:
    """A weight whose quantizer sees a group as a row: see `InsertFakeQuantize`."""
    site = node.meta["site"]
    rows, scale, zero_point = (values[n] for n in node.args[:3])  # type: ignore[index]
    code = _codes(node, rows, scale, zero_point, 0)
    ends = [user if site.spec.axis == 0 else next(iter(user.users)) for user in node.users]
    shape = ends[0].all_input_nodes[0].meta["val"].shape if site.spec.axis else ends[0].meta["val"].shape
    whole = [value.reshape(shape[0], -1) for value in (code, scale, zero_point)]
    whole = [value.t() if site.spec.axis else value for value in whole]
    with gm.graph.inserting_before(node):
        held = _held(gm, site.label, whole, node)
        new = call(gm.graph, DEQUANTIZE, *held, 1 - site.spec.axis, site.spec.group_size, like=ends[0])
    for end in ends:
        end.replace_all_uses_with(new)
    frozen.weights.append(site.label)


def _codes(node: fx.Node, weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """The codes that a fake-quant node of a weight computes, in the type that they are stored in."""
    quant_min, quant_max = node.args[-2:]
    if axis is not None:
        scale, zero_point = (numerics.per_channel_view(v, weight.dim(), axis) for v in (scale, zero_point))
    code = numerics.code_before_clamp(weight, scale, zero_point, node.kwargs["rounding"])  # type: ignore[arg-type]
    dtype = getattr(torch, storage(quant_min, quant_max)[0])  # type: ignore[arg-type]
    return numerics.clamp_code(code, quant_min, quant_max).to(dtype)  # type: ignore[arg-type]


def _held(gm: fx.GraphModule, label: str, values: Sequence[Tensor], like: fx.Node) -> list[fx.Node]:
    """Codes, scale and zero point as constants."""
    code, scale, zero_point = values
    named = (("codes", code), ("scale", scale), ("zero_point", zero_point.to(code.dtype)))
    return [constant(gm, f"{label}.{name}", value, like) for name, value in named]


def _guard_bias(node: fx.Node, scale: Tensor, values: _Values, label: str, frozen: Frozen) -> Tensor:
    """The weight's scale, raised where onnxruntime's int32 bias would overflow.

    Only channels of all but vanished weights (γ ≈ 0 under a bias) are concerned: their weights are below the
    bias by 2³¹ or more, so a coarser scale changes nothing that float32 could show.
    """
    for user in node.users:
        kind = kind_of(user)
        if kind is None or kind.name != "conv":
            continue
        bias, source = bias_of(user), unmoved(operands(user)["input"])
        if bias is None or bias not in values.constants or source.target is not QUANTIZE_DEQUANTIZE:
            continue
        least = values[bias].abs().to(torch.float64) / (float(source.args[1]) * BIAS_MAX)  # type: ignore[arg-type]
        least = least if scale.numel() == least.numel() else least.amax().reshape(1)  # one scale for all channels
        raised = torch.maximum(scale, (least * 2).to(scale.dtype))
        count = int((least > scale).sum())
        if count:
            frozen.notes.append(f"{label}: scale of {count} vanishing channels raised, so that their bias fits int32")
            scale = torch.where(least.to(scale.dtype) > scale, raised, scale)
    return scale


def _freeze_bias(gm: fx.GraphModule, node: fx.Node, values: _Values) -> None:
    """With the scale that the weight has by now; a bias that cannot be held so is folded to a float constant."""
    (conv,) = node.users
    weight, source = operands(conv)["weight"], unmoved(operands(conv)["input"])
    bias = node.args[0]
    if weight.target is not DEQUANTIZE or source.target is not QUANTIZE_DEQUANTIZE or bias not in values.constants:
        return
    scale = values[weight.args[1]] * torch.tensor(source.args[1], dtype=torch.float32)  # type: ignore[index]
    code = bias_codes(values[bias], scale).double().clamp(-BIAS_MAX, BIAS_MAX).to(torch.int32)  # type: ignore[index]
    label = str(weight.args[0].target).removesuffix("weight__codes")  # type: ignore[union-attr]
    with gm.graph.inserting_before(node):
        held = _held(gm, f"{label}bias", (code, scale, torch.zeros_like(scale)), node)
        new = call(gm.graph, DEQUANTIZE, *held, 0 if scale.dim() else None, like=node)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _freeze_rest(gm: fx.GraphModule, values: _Values) -> None:
    for node in list(gm.graph.nodes):
        computed = node.op == "call_function" and node in values.constants
        if computed and any(user not in values.constants for user in node.users):
            value = values[node]
            if isinstance(value, Tensor):
                with gm.graph.inserting_before(node):
                    node.replace_all_uses_with(constant(gm, f"folded.{node.name}", value, node))


def held_name(name: str) -> str:
    """What a constant is called in the exported file."""
    return name.replace(".", "__").replace("@", "__")


def constant(gm: fx.GraphModule, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    """A buffer of ``gm`` holding ``value``, and the node that reads it, at the insertion point."""
    target = held_name(name)
    while hasattr(gm, target):
        target += "_"
    gm.register_buffer(target, value.contiguous())
    node = gm.graph.get_attr(target)
    mode = next(v.fake_mode for v in _values_around(like) if hasattr(v, "fake_mode"))
    node.meta["val"] = mode.from_tensor(value)
    return node


def _values_around(node: fx.Node) -> list[Any]:
    return [n.meta.get("val") for n in (node, *node.all_input_nodes)]
