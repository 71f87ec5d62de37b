"""Tensors of which each process holds a part, inside the graphs of a model: tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxquant.errors import UnsupportedModel

SHARDED = (
    "tensors of a quantized graph must be plain ones: got a DTensor, as parallelize_module makes. Tensor parallelism "
    "is not supported; fully_shard and DistributedDataParallel are."
)


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # loaded by whoever has made one

    return isinstance(value, DTensor)


def refuse_sharded(tensors: Iterable[Any]) -> None:
    """Raises UnsupportedModel where one of a graph's tensors is a DTensor."""
    for value in tensors:
        if is_sharded(value):
            raise UnsupportedModel(SHARDED)
