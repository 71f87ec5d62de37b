"""What lets ``torch.compile`` without our backend fuse our operators, and how Triton then rounds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.ops.library import ARITHMETIC, WHEN_TRACED, to_be_told_again
from fxquant.ops.lowering_table import becomes
from fxquant.support.patches import CACHE_KEY

# Private settings; all three are in torch 2.11 and 2.13.
EXACT: Mapping[str, bool] = {
    # x / y as `div.rn`, not `div.full`.
    "eager_numerics.division_rounding": True,
    # Subnormal numbers are not taken for 0 in functions of libdevice, such as floor and ceil.
    "eager_numerics.disable_ftz": True,
    # The one switch against products contracted with sums; and half types are rounded where eager rounds them.
    "emulate_precision_casts": True,
}

NO_TRITON = {"cpu", "meta"}


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
        missing = _unset() if devices - NO_TRITON else []
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


def fuse_in_inductor() -> None:
    """Lets ``torch.compile`` without our backend fuse calls of ``fxquant.ops``, which would otherwise stay calls.

    Adds our operators to Inductor's decompositions, and the digest of our sources to the cache keys of graphs that hold
    one: torch's cache of traced graphs knows an operator by its name only. Other graphs are compiled, and found in
    caches, as ever. Happens by itself when Dynamo first meets an operator of ours; `forget` undoes it.
    """
    from torch._inductor import decomposition  # private; tried on 2.13 and 2.15

    ours = {op: arithmetic for op, arithmetic in ARITHMETIC.items() if becomes(op, "plain") == "arithmetic"}
    fusible = {op: Told(arithmetic, _warn_once) for op, arithmetic in ours.items()}
    decomposition.decompositions.update(fusible)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table, made when it was first asked for
    _sources_in_keys()


@functools.cache
def _sources_in_keys() -> None:
    CACHE_KEY.put()


def forget() -> None:
    """Undoes `fuse_in_inductor`, until Dynamo meets an operator of ours again."""
    from torch._inductor import decomposition  # private; tried on 2.13 and 2.15

    for op in ARITHMETIC:
        decomposition.decompositions.pop(op, None)
    decomposition.fast_random_decomps.cache_clear()
    if _sources_in_keys.cache_info().currsize:
        CACHE_KEY.take()
        _sources_in_keys.cache_clear()
    to_be_told_again()


WHEN_TRACED.append(fuse_in_inductor)


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("fxquant").warning("%s", message)
