"""Results of fake kernels as the metadata they consist of, to be made again without running the kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Metadata(NamedTuple):
    """What a plain tensor without values is made of."""

    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


class Result(NamedTuple):
    """What an operator gave: one tensor, or several."""

    several: bool
    tensors: tuple[Metadata, ...]

    def fresh(self) -> Any:
        """New tensors in the same form; fake ones under a fake mode, which the caller has on."""
        made = tuple(torch.empty_strided(t.size, t.stride, dtype=t.dtype, device=t.device) for t in self.tensors)
        return made if self.several else made[0]


def result_of(value: Any) -> Result | None:
    """What `Result.fresh` needs to make such a value again; None where size and stride do not tell all."""
    items = value if isinstance(value, tuple) else (value,)
    if not items or not all(isinstance(v, Tensor) and _is_plain(v) for v in items):
        return None
    if len({v.untyped_storage()._cdata for v in items}) < len(items):
        return None  # views of each other
    return Result(
        isinstance(value, tuple), tuple(Metadata(tuple(v.shape), v.stride(), v.dtype, v.device) for v in items)
    )


def _is_plain(value: Tensor) -> bool:
    """A tensor that nothing but size, stride, dtype and device describes."""
    if value.layout != torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
        return False
    offset = value.storage_offset()
    return isinstance(offset, int) and offset == 0 and not value.requires_grad
