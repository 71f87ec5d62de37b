"""The exporter's graph in the forms that a runtime runs fastest, each equal to what it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What moves a tensor's values, or picks some of them.
_MOVES = frozenset({"Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def fold_pads(graph: Any) -> int:
    """A Pad of zeros becomes the convolution's own, also with the same quantizer before it and after::

        Conv(Pad(x, 0, p), pads=q)                             →  Conv(x, pads=q + p)
        Conv(DQ(Q(Pad(DQ(c, s, z), 0), s, z), s, z), pads=q)   →  Conv(DQ(c, s, z), pads=q + p)

    The same codes: a quantizer's code of 0 is its zero point, with which an integer convolution pads. PyTorch's
    convolutions have one number for both ends of an axis, so that a Pad of unequal ends reaches the file. onnxruntime
    pads in float there, and quantizes again; OpenVINO refuses a Pad of codes whose zero point is not 0. For zeros along
    the axes of space; where something else reads the Pad, it stays for that. Returns how many convolutions it changed.
    """
    done = 0
    for conv in [node for node in graph if node.op_type == "Conv" and not node.domain]:
        pad = _pad_before(conv.inputs[0])
        added = None if pad is None else _zeros_added(pad)
        if pad is None or added is None or not _is_explicit(conv):
            continue
        own = _ints(conv, "pads") or [0] * len(added)
        conv.attributes["pads"] = _attribute("pads", [one + two for one, two in zip(own, added, strict=True)])
        conv.replace_input_with(0, pad.inputs[0])
        done += 1
    if done:
        _drop_unread(graph)
    return done


def sum_before_norms(graph: Any) -> int:
    """``LayerNormalization(Add(x, y))``  →  ``LayerNormalization(Sum(x, y))``: the same numbers.

    onnxruntime makes one SkipLayerNormalization of the Add and the LayerNormalization, and its kernel takes longer than
    the two. Returns how many sums it changed.
    """
    adds = [node for node in graph if node.op_type == "Add" and any(_is_norm(user) for user in _users(node))]
    for node in adds:
        node.op_type = "Sum"
    return len(adds)


def _is_norm(node: Any) -> bool:
    return bool(node.op_type == "LayerNormalization")


def _pad_before(value: Any) -> Any:
    """The Pad that a value comes out of, or was quantized after with the numbers it had before; None of others."""
    node = value.producer()
    if node is None or node.op_type == "Pad":
        return node
    quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None
    pad = quantize.inputs[0].producer() if quantize is not None and quantize.op_type == "QuantizeLinear" else None
    if pad is None or pad.op_type != "Pad":
        return None
    before = pad.inputs[0].producer()
    while before is not None and before.op_type in _MOVES:
        before = before.inputs[0].producer()
    is_same = before is not None and before.op_type == "DequantizeLinear" and _same_grid(before, quantize)
    return pad if is_same and _same_grid(quantize, node) else None


def _same_grid(one: Any, two: Any) -> bool:
    """Whether two nodes have equal scales and zero points for the whole tensor, in codes of one type."""
    for index in (1, 2):
        a, b = (node.inputs[index] if len(node.inputs) > index else None for node in (one, two))
        if a is b:
            continue
        if a is None or b is None or a.const_value is None or b.const_value is None:
            return False
        first, second = a.const_value.numpy(), b.const_value.numpy()
        if first.dtype != second.dtype or first.size != 1 or second.size != 1 or first.item() != second.item():
            return False
    return True


def _zeros_added(pad: Any) -> list[int] | None:
    """How many zeros a Pad puts before each axis of space, then after each; None where it does something else."""
    mode, sizes = pad.attributes.get("mode"), pad.inputs[1].const_value
    filling = pad.inputs[2].const_value if len(pad.inputs) > 2 and pad.inputs[2] is not None else None
    is_zero = len(pad.inputs) < 3 or pad.inputs[2] is None or (filling is not None and not filling.numpy().any())
    has_axes = len(pad.inputs) > 3 and pad.inputs[3] is not None
    if (mode is not None and mode.as_string() != "constant") or sizes is None or not is_zero or has_axes:
        return None
    found = [int(size) for size in sizes.numpy()]
    rank = len(found) // 2
    if min(found) < 0 or any(found[:2] + found[rank : rank + 2]):
        return None
    return found[2:rank] + found[rank + 2 :]


def _is_explicit(conv: Any) -> bool:
    given = conv.attributes.get("auto_pad")
    return given is None or given.as_string() == "NOTSET"


def _ints(node: Any, name: str) -> list[int]:
    found = node.attributes.get(name)
    return [] if found is None else [int(each) for each in found.as_ints()]


def _attribute(name: str, values: list[int]) -> Any:
    import onnx_ir as ir

    return ir.AttrInt64s(name, values)


def _users(node: Any) -> Iterator[Any]:
    return (user for value in node.outputs for user, _ in value.uses())


def _drop_unread(graph: Any) -> None:
    """Removes nodes that nobody reads any more."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value in graph.outputs for value in node.outputs):
            graph.remove(node, safe=True)
