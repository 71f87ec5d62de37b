"""The forward that brings an owner's state into compiled graphs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.aside import in_compiled_region, is_compiled, own_code
from fxquant.errors import NotQuantizedWarning
from fxquant.ops.marks import bind
from fxquant.plan.plan import LocalSite
from fxquant.plan.site_lists import register
from fxquant.prepared.live import LIVE
from fxquant.prepared.quantizer import ATTRIBUTE, Quantizer
from fxquant.support.patches import BUCKETS

# Whether this thread's torch.export traces for `fxquant.export_onnx`; a user's own export sees the float model.
_EXPORTING: ContextVar[bool] = ContextVar("fxquant exports", default=False)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Owners bind their state inside, as they do under Dynamo."""
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


def is_exporting() -> bool:
    """Whether that is so in this thread now."""
    return _EXPORTING.get()


class BoundForward:
    """The forward of an owner: binds its quantizers' state in compiled graphs, then runs the module's own forward.

    Plain eager Python runs the float model. That is also what happens to a frame that Dynamo leaves eager inside
    torch.compile; then a warning says so once, and `eager_runs` counts it for `fxquant.explain`.

    The module gets it as `method`: of a bound method Dynamo guards on the code alone, of any other callable on the
    object, and then no two instances of a class share a compile.
    """

    def __init__(self, module: nn.Module, sites: tuple[LocalSite, ...], target: str) -> None:
        self.module = module
        self.target = target
        self.inner = module.__dict__.get("forward")
        self.sites = sites
        self.names = tuple(site.name for site in sites)
        self.key = register(sites, target)
        self.eager_runs = 0
        self.group: str | None = None  # as `sync_ranges` sets it, for `fxquant.ops.marks.bind`
        self.before = False
        LIVE.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or is_exporting():
            self.bind()
        else:
            self._note_eager()
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def bind(self) -> None:
        """Makes the state of every site an input of the graph being traced."""
        quantizers: Any = self.module.quantizers
        modes, state = [], []
        for name in self.names:
            quantizer = quantizers[name]
            modes.append(int(quantizer.mode(self.module.training)))
            for kept in quantizer.site.spec.range.state_names:  # not a property: Dynamo traces each for every site
                state.append(getattr(quantizer, kept))
        bind(self.key, modes, state, self.group, self.before)

    def quantizers(self) -> Iterator[Quantizer]:
        """Those of the module."""
        found: Any = getattr(self.module, ATTRIBUTE, {})
        return iter(found.values())

    def release(self) -> None:
        """The module is no part of a prepared model any more, whoever still holds this object."""
        LIVE.discard(self)

    def _note_eager(self) -> None:
        if not self.names:
            return
        if in_compiled_region():
            how = "inside torch.compile"
            why = "Dynamo left its frame out: see TORCH_LOGS=graph_breaks,recompiles for why"
        elif any(is_compiled(module) for module in self.module.modules()):
            how = "around modules that are compiled"
            why = "Compile it as a whole, or leave them float: fxquant.override(model, {key: None})"
        else:
            return
        if self.eager_runs == 0:
            warnings.warn(
                f"{type(self.module).__name__} ran in eager Python {how}, so its {len(self.names)} quantized tensors "
                f"({', '.join(self.names[:4])}) stayed float. {why}.",
                NotQuantizedWarning,
                stacklevel=3,
            )
        self.eager_runs += 1

    @property
    def method(self) -> types.MethodType:
        """The module's ``forward``, with the signature of its own: exporters and trainers read it.

        Equal site lists on one class share a code object. Pickle finds a bound method by its name.
        """
        cls = type(self.module)
        code = _code_for(f"{cls.__module__}.{cls.__qualname__}.{self.key}")
        function = types.FunctionType(code, BoundForward.__call__.__globals__, "method")
        shown = inspect.signature(self.inner or cls.forward.__get__(self.module))
        owner = inspect.Parameter("_bound", inspect.Parameter.POSITIONAL_ONLY)
        function.__dict__["__signature__"] = shown.replace(parameters=[owner, *shown.parameters.values()])
        return types.MethodType(function, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.sites, self.target)
        quantize_before_buckets()
        LIVE.add(self)


@functools.cache
def _code_for(name: str) -> types.CodeType:
    return own_code(BoundForward.__call__, name).__code__


@functools.cache
def quantize_before_buckets() -> None:
    """Keeps `BUCKETS` in place from now on: torch looks for it before it calls a backend."""
    BUCKETS.put()


def bound_forward(module: nn.Module) -> BoundForward | None:
    """What `fxquant.prepare` put in the place of the module's forward, None for modules that own no quantizer."""
    found = getattr(module.__dict__.get("forward"), "__self__", None)
    return found if isinstance(found, BoundForward) else None


def settle_after(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, and a look on the host after each call whether delayed ranges that it read are set now.

    For graphs that take a tensor's own range where none is stored. The ranges that are set make Dynamo take another
    graph at the next call, in which no quantizer waits for its tensor's extremes.
    """

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        given = {id(value) for value in inputs if isinstance(value, Tensor)}
        for part in list(LIVE):
            if isinstance(part, BoundForward):
                for quantizer in part.quantizers():
                    if not quantizer.resolved and id(quantizer.evidence) in given:
                        quantizer.settle(but_for_zeros=True)
        return outputs

    return run
