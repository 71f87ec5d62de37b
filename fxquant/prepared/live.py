"""The parts of prepared models that are alive in this process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn


class Part(Protocol):
    """What stands on a module of a prepared model: its root, or the forward of an owner."""

    module: nn.Module


LIVE: weakref.WeakSet[Part] = weakref.WeakSet()


def of_prepared_model(tensors: Iterable[Any]) -> bool:
    """Whether any of the tensors is a parameter of a prepared model that is alive."""
    known = {id(parameter) for part in LIVE for parameter in part.module.parameters()}
    return any(id(tensor) in known for tensor in tensors)
