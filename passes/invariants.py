"""What every graph between passes must satisfy; a violation is a bug of fxquant, named with the pass."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.errors import InvariantViolated
from fxquant.ops.fake_quantize import FAKE_QUANTIZE


def check_invariants(gm: fx.GraphModule, when: str) -> None:
    """Raises InvariantViolated unless fake-quant nodes are well formed and read what they may.

    - its input and result have the same shape and dtype, a floating one;
    - its scale and zero point are float32 and integer tensors;
    - no fake-quantized value reaches another op as a scale.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in FAKE_QUANTIZE:
            continue
        source, scale = node.args[0], node.args[1]
        value, origin = node.meta.get("val"), source.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(origin, torch.Tensor):
            if value.dtype != origin.dtype or value.shape != origin.shape or not value.is_floating_point():
                raise InvariantViolated(
                    f"{when}: {node.name} must keep shape and floating dtype: got {tuple(value.shape)} {value.dtype} "
                    f"from {tuple(origin.shape)} {origin.dtype}."
                )
        if isinstance(scale, fx.Node):
            if scale.op == "call_function" and scale.target in FAKE_QUANTIZE:
                raise InvariantViolated(f"{when}: the scale of {node.name} must not be fake-quantized itself.")
            found = scale.meta.get("val")
            if isinstance(found, torch.Tensor) and found.dtype != torch.float32:
                raise InvariantViolated(f"{when}: the scale of {node.name} must be float32: got {found.dtype}.")
