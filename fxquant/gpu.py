"""What Inductor is told for graphs on a GPU, where it writes Triton: to round as eager kernels round.

Its own choice is speed. Triton's ``/`` on float32 is off by up to 2 units in the last place, and a product and a sum
become one operation with one rounding; a value near a tie then gets another code than in eager mode and on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.passes.base import Decline, Pass
from fxquant.passes.keep_divisions import KeepDivisions

# Private settings; all three are in torch 2.11 and 2.13.
EXACT: Mapping[str, bool] = {
    # x / y as `div.rn`, not `div.full`.
    "eager_numerics.division_rounding": True,
    # Subnormal numbers are not taken for 0 in functions of libdevice, such as floor and ceil.
    "eager_numerics.disable_ftz": True,
    # The one switch against products contracted with sums; and half types are rounded where eager rounds them.
    "emulate_precision_casts": True,
}

_NO_TRITON = {"cpu", "meta"}


def is_on_gpu(gm: fx.GraphModule, inputs: Iterable[Any]) -> bool:
    """Whether a graph has a tensor that is not on a CPU: then Triton computes."""
    values = [*inputs, *(node.meta.get("val") for node in gm.graph.nodes)]
    found = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return bool(found - _NO_TRITON)


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


@dataclass(frozen=True)
class Told:
    """The decomposition of an operator for plain ``backend="inductor"``, which has no settings of ours.

    ``warn`` is called with what is not set, each time that a graph on a GPU is traced. A class, because torch's caches
    pickle decompositions.
    """

    arithmetic: Callable[..., Any]
    warn: Callable[[str], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        devices = {value.device.type for value in args if isinstance(value, torch.Tensor)}
        missing = _unset() if devices - _NO_TRITON else []
        if missing:
            self.warn(
                "operators of fxquant must be compiled by backend='fxquant' to give eager's codes on a GPU: got "
                f"another, without {' and '.join(missing)} in torch._inductor.config. Set them, or use "
                "backend='fxquant' with options={'recipe': None}."
            )
        return self.arithmetic(*args, **kwargs)


def _unset() -> list[str]:
    from torch._inductor import config

    values = config.get_config_copy()
    return [name for name, value in EXACT.items() if values.get(name) != value]
