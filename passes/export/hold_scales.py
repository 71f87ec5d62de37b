"""Q/DQ pairs as codes in memory, whose scales are state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes
from fxquant.ops.qdq import QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.ops.quantize import DEQUANTIZE_TENSOR, QUANTIZE_TENSOR
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant
from fxquant.passes.export.pairs import Dequantized, Pair
from fxquant.passes.stages import EXPORT

LABEL = "quantized_site"


@dataclass(frozen=True, kw_only=True)
class HoldScales(Pass):
    """``quantize_dequantize(x, 0.1, 0, -128, 127)``  →  ``dequantize(quantize(x, s, z, 0, 255, uint8), s, z)``.

    ``s`` (float32) and ``z`` (int32) are buffers, so that another state brings its own scales. Codes of at most 8 bits
    are uint8, which CPUs have kernels for: signed ones move by 128 with their zero point. Wider ones are int32.
    ``meta["quantized_site"]`` of a quantize is its site's key. ExportError for small floats and for scales of tokens
    and blocks, which have no integer kernels.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces all pairs."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if node.target is QUANTIZE_DEQUANTIZE_BLOCKS:
                raise ExportError(_no_integers(argument(node, "label"), "scales of tokens or blocks"))
            weight, pair = Dequantized.of(node), Pair.of(node)
            if weight is not None and weight.element is not None:
                raise ExportError(_no_integers(str(weight.code.target), f"codes of {weight.element}"))
            if pair is not None:
                _replace(gm, pair)
                done += 1
        return done


def _replace(gm: fx.GraphModule, pair: Pair) -> None:
    if pair.element is not None:
        raise ExportError(_no_integers(pair.label, f"codes of {pair.element}"))
    graph, node, (low, high) = gm.graph, pair.node, pair.limits
    shift = 128 if low < 0 and high - low < 256 else 0
    kind = torch.uint8 if low + shift >= 0 and high + shift <= 255 else torch.int32
    with graph.inserting_before(node):
        scale = constant(gm, f"{pair.label}.scale", torch.tensor(pair.scale, dtype=torch.float32), node)
        point = torch.tensor(pair.zero_point + shift, dtype=torch.int32)
        zero = constant(gm, f"{pair.label}.zero_point", point, node)
        grid = (scale, zero, low + shift, high + shift, kind)
        codes = call(graph, QUANTIZE_TENSOR, pair.input, *grid, rounding="divide", like=node)
        codes.meta[LABEL] = pair.label
        value = call(graph, DEQUANTIZE_TENSOR, codes, scale, zero, dtype=torch.float32, like=node)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _no_integers(label: str, what: str) -> str:
    return (
        f"{label} must have a format that integer kernels multiply: got {what}. Prepare with recipe 'int8' or 'w4a8', "
        "or override this site."
    )
