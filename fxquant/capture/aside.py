"""Running and compiling a user's model without a trace on it."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def in_compiled_region() -> bool:
    """Whether plain Python is running inside a torch.compile call, that is, Dynamo left this frame eager."""
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:  # private; tried on 2.13 and 2.15
        return True  # also where it is False: after the recompile limit
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:  # under torch.compiler.disable there is no callback, but the call can be seen
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is torch.compile's wrapper, or compiled in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def traces_recurrent_layers() -> bool:
    """Whether Dynamo makes graphs of `nn.LSTM` and its like: only where its user has set it. Private; tried on 2.13."""
    return bool(torch._dynamo.config.allow_rnn)


def tracing_recurrent_layers() -> contextlib.AbstractContextManager[None]:
    """Inside, it does."""
    found: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch({"allow_rnn": True})
    return found


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Runs a block and puts buffers, attributes, training flags and random state back, whatever the block did.

    Of parameters those that a forward writes into: embeddings with ``max_norm``.
    """
    written = [module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None]
    tables = [table for table in written if isinstance(table, torch.Tensor)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in [*model.buffers(), *tables]]
    own = [(module, type(module), dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, kind, attributes, registered in own:
            if type(module) is kind:  # a lazy module has become what it stood for
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(registered)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, modules that their user compiled in place run as if they were not."""
    in_place = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    for module, _ in in_place:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in in_place:
            module._compiled_call_impl = call


@contextlib.contextmanager
def compiled_aside(model: Any, backend: Callable[..., Any], **options: Any) -> Iterator[Callable[..., Any]]:
    """``torch.compile(model, backend=backend)`` that leaves no trace on the model or in recompile counts.

    Modules that their user compiled in place run uncompiled meanwhile: after a graph break theirs would take over.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not before torch 2.13
        options["isolate_recompiles"] = True
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    with torch._dynamo.config.patch(limits), uncompiled(model):
        # A module's wrapper passes what is set on it to the module: torch sets a mark, and the torch.compile that
        # Lightning puts in the place of torch's its arguments, over those of the user's own compile.
        before = dict(vars(model))
        compiled = torch.compile(model, backend=backend, **options)
        told = [name for name, value in vars(model).items() if name not in before or before[name] is not value]
        try:
            yield compiled
        finally:
            for name in told:
                vars(model).pop(name, None)
            vars(model).update({name: before[name] for name in told if name in before})


def own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """The function once more, with a code object of its own under ``name``.

    Dynamo counts recompiles, learns dynamic sizes and gives up per code object and its name: of modules that share
    one, each new class would bring the recompile limit nearer, and one that cannot be traced would leave all eager.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def allow_recompiles(count: int) -> None:
    """Lets Dynamo keep at least ``count`` graphs more of one frame than it does by default; past its limit it stops."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 + count)
