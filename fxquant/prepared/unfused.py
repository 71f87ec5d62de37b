"""Evaluation by the operators that training runs: torch's fused kernels of attention are left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.backends import mha

from fxquant.prepared.bound_forward import is_exporting
from fxquant.prepared.own_forward import OwnForward

# Evaluated without gradients, their forwards call one operator for all that they hold, or change to nested tensors.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def _unfused_call(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Runs the module's forward, without the fused kernels in what is compiled or exported."""
    forward = owner if isinstance(owner, Unfused) else getattr(owner, Unfused.SLOT, None)
    if forward is None:  # on a module that was stripped
        return type(owner).forward(owner, *args, **kwargs)
    if forward.active and (torch.compiler.is_dynamo_compiling() or is_exporting()):
        return _run_unfused(forward, args, kwargs)
    return forward.run(args, kwargs)


class Unfused(OwnForward):
    """A forward that, where it is compiled or exported, takes the branch that training takes.

    Plain eager Python stays torch's own.
    """

    SLOT: ClassVar[str] = "_fxquant_unfused"
    CALL: ClassVar[Callable[..., Any]] = staticmethod(_unfused_call)

    def code_name(self) -> str:
        """One for each class."""
        return f"unfused {super().code_name()}"


def _run_unfused(forward: Unfused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a forward with the switch of ``torch.backends.mha`` off.

    By its variable: Dynamo takes `set_fastpath_enabled` for a function that it must not trace, and a variable that is
    put back within a graph stays what it was for all others. Private; tried on 2.13.
    """
    before = mha._is_fastpath_enabled
    mha._is_fastpath_enabled = False
    try:
        return forward.run(args, kwargs)
    finally:
        mha._is_fastpath_enabled = before


def attach_unfused(model: nn.Module) -> None:
    """Gives the modules of a model that torch fuses in evaluation a forward that is not fused where it is compiled."""
    for module in model.modules():
        if isinstance(module, _FUSED):
            (Unfused.of(module) or Unfused(module)).attach()


def detach_unfused(model: nn.Module) -> None:
    """Undoes `attach_unfused`."""
    for module in model.modules():
        unfused = Unfused.of(module)
        if unfused is not None:
            unfused.detach()


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """`attach_unfused` for a block."""
    attach_unfused(model)
    try:
        yield
    finally:
        detach_unfused(model)
