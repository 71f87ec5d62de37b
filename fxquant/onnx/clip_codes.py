"""Codes of fewer bits than their type: clipped as codes, where a Clip of floats would keep a product from integers."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDE = "@wide"
"""Ends the name of codes before they are clipped; the clipped ones have the site's."""

_ON_THE_GRID = 1e-3  # of a step: edges are float32 multiples of the scale


def clip_codes(graph: Any) -> int:
    """A Clip to the range of a quantizer stands after it, on its codes::

        Conv → Clip(−0.8, 0.7) → QuantizeLinear(0.1, 8)  →  Conv → QuantizeLinear(0.1, 8) → Clip(0, 15)

    The same codes: rounding is monotonic, and the edges are multiples of the scale. Codes of 2 to 7 bits are bytes, as
    onnxruntime's integer kernels read no others, and a Clip that narrows the range of bytes keeps a convolution, or a
    product without a bias, in float there. Returns how many it moved.
    """
    import onnx_ir as ir

    done = 0
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        clip = quantize.inputs[0].producer()
        limits = _as_codes(clip, quantize) if clip is not None and clip.op_type == "Clip" else None
        if clip is None or limits is None:
            continue
        (codes,) = quantize.outputs
        kind = quantize.inputs[2].const_value.numpy().dtype
        quantize.replace_input_with(0, clip.inputs[0])
        edges = []
        for word, limit in zip(("low", "high"), limits, strict=True):
            tensor = ir.tensor(kind.type(limit), name=f"{codes.name}_{word}")
            edge = ir.Value(name=tensor.name, shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(edge)
            edges.append(edge)
        clipped = ir.node("Clip", [codes, *edges], name=f"{quantize.name}_codes")
        (result,) = clipped.outputs
        result.shape, result.type = codes.shape, codes.type
        ir.convenience.replace_all_uses_with(codes, result, replace_graph_outputs=True)
        clipped.replace_input_with(0, codes)
        result.name, codes.name = codes.name, f"{codes.name}{WIDE}"
        graph.insert_after(quantize, clipped)
        if not clip.outputs[0].uses() and clip.outputs[0] not in graph.outputs:
            graph.remove(clip, safe=True)
        done += 1
    return done


def _as_codes(clip: Any, quantize: Any) -> tuple[int, int] | None:
    """The edges of a Clip as codes of the QuantizeLinear after it; None where they are none, or not narrower."""
    if len(clip.inputs) < 3 or len(quantize.inputs) < 3 or None in (*clip.inputs, *quantize.inputs):
        return None
    held = [value.const_value for value in (*clip.inputs[1:], *quantize.inputs[1:])]
    if any(value is None or value.size != 1 for value in held):
        return None
    low, high, scale, point = (value.numpy() for value in held)
    if point.dtype not in (np.uint8, np.int8):
        return None
    least, most = np.iinfo(point.dtype).min, np.iinfo(point.dtype).max
    limits = []
    for edge in (low, high):
        steps = float(edge) / float(scale)
        if not abs(steps) < 2**16 or abs(steps - round(steps)) > _ON_THE_GRID:
            return None
        limits.append(min(max(round(steps) + int(point), least), most))
    return (limits[0], limits[1]) if limits != [least, most] else None
