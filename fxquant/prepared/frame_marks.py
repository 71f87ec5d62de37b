"""Marks that show where the frame of each module begins, while `prepare` looks at the graphs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.capture.aside import own_code, traces_recurrent_layers
from fxquant.ops.marks import bind


class _Marker:
    """A forward that only says which module's frame begins, while `prepare` looks at the graphs."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            bind(self.path, [], [])
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class _Recorder(_Marker):
    """The forward of a recurrent layer, which Dynamo leaves to Python: remembers the sequences that it is given."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__(module, path)
        self.given: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not traces_recurrent_layers():
            _record(self.given, *args, **kwargs)
        return _Marker.__call__(self, *args, **kwargs)


@torch.compiler.disable
def _record(given: list[Tensor], input: Tensor | PackedSequence, hx: Any = None) -> None:
    given.append((input.data if isinstance(input, PackedSequence) else input).detach())


def may_own(module: nn.Module) -> bool:
    """Whether a module can hold quantizers: a ModuleDict or ModuleList that has a forward may run all that it holds."""
    return not isinstance(module, nn.ModuleDict | nn.ModuleList | torch.jit.ScriptModule)


@contextlib.contextmanager
def frame_marks(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, Dynamo's graphs show with a bind node where the frame of each module begins that `may_own` its sites.

    Gives, by path, the sequences of recurrent layers that Dynamo left to Python, packed ones as one.
    """
    markers = [
        (_Recorder if isinstance(module, nn.RNNBase) else _Marker)(module, path)
        for path, module in model.named_modules()
        if type(module).forward is not nn.Module.forward and may_own(module)
    ]
    for marker in markers:
        call = own_code(type(marker).__call__, f"marker of {marker.path}")
        marker.module.__dict__["forward"] = types.MethodType(call, marker)
    try:
        yield {marker.path: marker.given for marker in markers if isinstance(marker, _Recorder)}
    finally:
        for marker in markers:
            del marker.module.__dict__["forward"]
            if marker.inner is not None:
                marker.module.__dict__["forward"] = marker.inner
