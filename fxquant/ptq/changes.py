"""Changes of tensors that an error takes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Changes:
    """Tensors written in place, each with what it held before the first write."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Writes ``value``, rounded to the tensor's dtype."""
        self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        tensor.copy_(value)

    @torch.no_grad()
    def take_back(self) -> None:
        """Every tensor as it was."""
        for tensor, before in self._before.values():
            tensor.copy_(before)
        self._before.clear()


@contextlib.contextmanager
def undone_on_error() -> Iterator[Changes]:
    """Inside, what is put is put for good, unless the block ends with an error."""
    changes = Changes()
    try:
        yield changes
    except BaseException:
        changes.take_back()
        raise
