"""Values that were moved are quantized where they are read: the runtime then moves, and multiplies, integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph.kinds import operands
from fxquant.graph.moves import PADS, PERMUTING, REPEATING, is_agnostic
from fxquant.graph.nodes import call_nodes, packet
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.pairs import CONVOLUTIONS, MATMULS, is_quantized_again, pair_before, quantized_again
from fxquant.passes.stages import EXPORT

_PRODUCTS = MATMULS | CONVOLUTIONS


@dataclass(frozen=True, kw_only=True)
class RequantizeMoved(Pass):
    """``expand(QDQ(x))``  →  ``QDQ(expand(QDQ(x)))`` with the same scale, which gives the same codes.

    onnxruntime moves no DequantizeLinear across operators that repeat values; across the others it does.
    ``pads``: after pads as well, for runtimes that pad floats only.
    """

    stages: ClassVar = (EXPORT,)

    pads: bool = False

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Quantizes after expansions, nearest upsampling and pads."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            stops = packet(node) in REPEATING or (self.pads and packet(node) in PADS and is_agnostic(node))
            pair = pair_before(node.all_input_nodes[0]) if stops else None
            if pair is not None and not is_quantized_again(node, pair):
                users = list(node.users)
                again = quantized_again(node, pair)
                for user in users:
                    user.replace_input_with(node, again)
                done += 1
        return done


@dataclass(frozen=True, kw_only=True)
class RequantizeTransposed(Pass):
    """``matmul(q, transpose(QDQ(k)))``  →  ``matmul(q, QDQ(transpose(QDQ(k))))``: the runtime then moves integers."""

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Quantizes what products read through a transpose."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            for value in dict.fromkeys(operands(node).values()) if packet(node) in _PRODUCTS else ():
                pair = pair_before(value)
                if pair is not None and _is_transposed(value):
                    again = quantized_again(value, pair)
                    for user in [user for user in value.users if packet(user) in _PRODUCTS]:
                        user.replace_input_with(value, again)
                    done += 1
        return done


def _is_transposed(value: fx.Node) -> bool:
    while is_agnostic(value) and packet(value) not in PERMUTING:
        value = value.all_input_nodes[0]
    return packet(value) in PERMUTING
