"""Integer weights of 4 bits, two codes to a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes
from fxquant.ops.int4 import UNPACK_INT4, pack_int4
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, constant_value
from fxquant.passes.export.pairs import Dequantized
from fxquant.passes.stages import EXPORT


@dataclass(frozen=True, kw_only=True)
class PackCodes(Pass):
    """``dequantize_affine(codes, …)``  →  ``dequantize_affine(view(unpack_int4(bytes), shape), …)``.

    Of the weights that ``int4`` names, as `Freeze` names them; each slice of the first axis is packed on its own.
    """

    stages: ClassVar = (EXPORT,)

    int4: frozenset[str] = frozenset()

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Packs what products and lookups read as floats."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            view = Dequantized.of(node)
            if view is None or view.code.op != "get_attr" or str(view.code.target) not in self.int4:
                continue
            codes = constant_value(gm, view.code)
            rows = codes.flatten(1) if codes.dim() else codes.reshape(1, 1)
            with gm.graph.inserting_before(node):
                held = constant(gm, f"{view.code.target}_packed", pack_int4(rows), like=node)
                flat = call(gm.graph, UNPACK_INT4, held, rows.shape[1], codes.dtype == torch.int8, like=node)
                shaped = call(gm.graph, torch.ops.aten.view.default, flat, list(codes.shape), like=node)
            node.replace_input_with(view.code, shaped)
            done += 1
        if done:
            gm.graph.eliminate_dead_code()
        return done
