"""Evaluation by the operators that training runs: torch's fused kernels of attention are left out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.backends import mha

from fxquant.capture.aside import own_code
from fxquant.prepared.bound_forward import is_exporting

# Evaluated without gradients, their forwards call one operator for all that they hold, or change to nested tensors.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Unfused:
    """A forward that, where it is compiled or exported, takes the branch that training takes.

    Plain eager Python stays torch's own. The module gets it as `method`, like a `BoundForward`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or is_exporting():
            return _run_unfused(self, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def method(self) -> types.MethodType:
        """The module's ``forward``, with the signature of its own. Pickle finds it by this name."""
        cls = type(self.module)
        function = types.FunctionType(_code_for(f"{cls.__module__}.{cls.__qualname__}"), globals(), "method")
        shown = inspect.signature(self.inner or cls.forward.__get__(self.module))
        first = inspect.Parameter("_unfused", inspect.Parameter.POSITIONAL_ONLY)
        function.__dict__["__signature__"] = shown.replace(parameters=[first, *shown.parameters.values()])
        return types.MethodType(function, self)


@functools.cache
def _code_for(name: str) -> types.CodeType:
    return own_code(Unfused.__call__, f"unfused {name}").__code__


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
            module.__dict__["forward"] = Unfused(module).method


def detach_unfused(model: nn.Module) -> None:
    """Undoes `attach_unfused`."""
    for module in model.modules():
        unfused = getattr(module.__dict__.get("forward"), "__self__", None)
        if isinstance(unfused, Unfused):
            del module.__dict__["forward"]
            if unfused.inner is not None:
                module.__dict__["forward"] = unfused.inner


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """`attach_unfused` for a block."""
    attach_unfused(model)
    try:
        yield
    finally:
        detach_unfused(model)
