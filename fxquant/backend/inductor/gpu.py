"""What Inductor is told for graphs on a GPU, where it writes Triton: to round as eager kernels round.

Its own choice is speed. Triton's ``/`` on float32 is off by up to 2 units in the last place, and a product and a sum
become one operation with one rounding; a value near a tie then gets another code than in eager mode and on the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxquant.ops.plain_inductor import EXACT, NO_TRITON
from fxquant.passes.base import Decline, Pass
from fxquant.passes.post_grad.keep_divisions import KeepDivisions


def is_on_gpu(gm: fx.GraphModule, inputs: Iterable[Any]) -> bool:
    """Whether a graph has a tensor that is not on a CPU: then Triton computes."""
    values = [*inputs, *(node.meta.get("val") for node in gm.graph.nodes)]
    found = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return bool(found - NO_TRITON)


def exact_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`EXACT`, less what ``chosen``, the user's own settings, decide."""
    return {name: value for name, value in EXACT.items() if name not in chosen}


def exact_passes() -> tuple[Pass, ...]:
    """On Inductor's graphs, behind its own passes."""
    return (KeepDivisions(),)


def overruled(chosen: Mapping[str, Any]) -> tuple[Decline, ...]:
    """One for each setting that the user has turned off."""
    return tuple(
        Decline(
            pass_name="fxquant",
            node="graph",
            reason=f"options['inductor'] sets {name}={chosen[name]}: on this GPU codes may differ from eager's",
        )
        for name, value in EXACT.items()
        if chosen.get(name, value) != value
    )
