"""A forward in the place of a module's own, that stays known however others wrap, rebind or copy it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from torch import nn

from fxquant.capture.aside import own_code

T = TypeVar("T", bound="OwnForward")


class OwnForward:
    """What stands in the place of a module's forward, and runs that.

    The module gets it as a bound method: of these Dynamo guards on the code alone, of any other callable on the
    object, and then no two instances of a class share a compile. Trainers take ``forward.__func__`` and bind it to the
    module itself; it is then found in the module's ``SLOT``. It stays there as long as a wrapper may call it.

    Attributes:
        inner: the forward that the module's instance had before, None for that of its class.
        active: whether it does more than to run the module's own.
    """

    SLOT: ClassVar[str]
    CALL: ClassVar[Callable[..., Any]]
    """The function that runs: its first argument is the object, or the module that has it."""
    active: bool = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")

    @classmethod
    def of(cls: type[T], module: nn.Module) -> T | None:
        """What a module has of this kind, active or not."""
        found = module.__dict__.get(cls.SLOT)
        return found if isinstance(found, cls) else None

    def attach(self) -> None:
        """Takes the place of the module's forward; one that a wrapper has kept is active again."""
        self.active = True
        held = self.module.__dict__
        if held.get(self.SLOT) is not self or "forward" not in held:
            held[self.SLOT], held["forward"] = self, self.forward

    def detach(self) -> None:
        """Gives the module its own forward back; under a wrapper of others it only runs that from now on."""
        self.active = False
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is not self:
            return
        del self.module.__dict__["forward"], self.module.__dict__[self.SLOT]
        if self.inner is not None:
            self.module.__dict__["forward"] = self.inner

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def code_name(self) -> str:
        """Those of one name share a code object, and so a place where Dynamo keeps compiled code."""
        cls = type(self.module)
        return f"{cls.__module__}.{cls.__qualname__}"

    @property
    def forward(self) -> types.MethodType:
        """The method that the module gets, with the signature of its own. Pickle finds it by this name.

        The signature is that of the function that it is said to wrap, not its own, which `functools.wraps` would copy.
        Who takes wrappers off, as accelerate does, ends there: it does the same.
        """
        call, shown = type(self).CALL, inspect.signature(self.inner or type(self.module).forward.__get__(self.module))
        code = _code_for(call, self.code_name())
        method, function = (types.FunctionType(code, call.__globals__, "forward") for _ in range(2))
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        function.__dict__["__signature__"] = shown.replace(parameters=[owner, *shown.parameters.values()])
        method.__dict__["__wrapped__"] = function
        return types.MethodType(method, self)

    method = forward  # its name in pickles of version 0.1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Of a method that others bound to the module pickle keeps the name alone: it finds this one.
        self.module.__dict__.setdefault(self.SLOT, self)
        self.module.__dict__.setdefault("forward", self.forward)


@functools.cache
def _code_for(call: Callable[..., Any], name: str) -> types.CodeType:
    return own_code(call, name).__code__


@contextlib.contextmanager
def inactive(model: nn.Module, kind: type[OwnForward]) -> Iterator[None]:
    """Inside, the modules of a model run their own forwards."""
    found = [part for module in model.modules() if (part := kind.of(module)) is not None and part.active]
    for part in found:
        part.active = False
    try:
        yield
    finally:
        for part in found:
            part.active = True
