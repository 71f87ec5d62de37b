"""The operators with arguments: what the checks of `test_every_op` run on. Each family lists its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One operator with one set of arguments.

    Attributes:
        name: readable id, unique over all families.
        op: the OpOverload.
        args: gives fresh positional arguments for an input ``x``, on ``x``'s device; ``x`` itself is the first.
            Other tensors may follow from x's shape, so that any shape that `fits` allows works.
        kwargs: keyword-only arguments.
        grads: names of the arguments that receive a gradient, ``"input"`` if only x does, () if none.
        dtypes: of x.
        shape: of x where the check does not vary it.
        elementwise: whether any shape and layout of x is allowed, empty and 0-d too.
        fuses: whether Inductor leaves no call behind.
        takes_x: whether x is the first argument itself, so that a check may map it or change its layout.
    """

    name: str
    op: Any
    args: Callable[[Tensor], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grads: tuple[str, ...] = ("input",)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    shape: tuple[int, ...] = (6, 5, 8)
    elementwise: bool = True
    fuses: bool = True
    takes_x: bool = True

    def __str__(self) -> str:
        return self.name
