"""The forward that brings an owner's state into compiled graphs."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxquant.capture.aside import in_compiled_region, is_compiled, traces_recurrent_layers
from fxquant.capture.sharded import refuse_sharded
from fxquant.errors import NotQuantizedWarning
from fxquant.ops.marks import bind
from fxquant.plan.plan import LocalSite
from fxquant.plan.site_lists import register
from fxquant.prepared.live import LIVE
from fxquant.prepared.own_forward import OwnForward
from fxquant.prepared.quantizer import ATTRIBUTE, Quantizer, owners
from fxquant.prepared.recurrent import quantized_weights
from fxquant.prepared.root import Root
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


_PLAIN = (Tensor, nn.Parameter)


def _bound_call(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Binds in what is compiled or exported, then runs the module's own forward."""
    bound = owner if isinstance(owner, BoundForward) else getattr(owner, BoundForward.SLOT, None)
    if bound is None:  # on a module that was stripped
        return type(owner).forward(owner, *args, **kwargs)
    if bound.active:
        if bound.recurrent and not traces_recurrent_layers():
            return _run_in_python(bound, args, kwargs)
        if torch.compiler.is_dynamo_compiling() or is_exporting():
            bound.bind()
        else:
            bound.note_eager()
    return bound.run(args, kwargs)


@torch.compiler.disable
def _run_in_python(bound: BoundForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Quantizes the weights of a recurrent layer within a compiled call, as a graph would."""
    if is_exporting():
        bound.bind()
    elif bound.names and in_compiled_region():
        layer: Any = bound.module
        bound.python_runs += 1
        with quantized_weights(layer, bound.quantizers(), bound.functions):
            return bound.run(args, kwargs)
    else:
        bound.note_eager()
    return bound.run(args, kwargs)


class BoundForward(OwnForward):
    """The forward of an owner: binds its quantizers' state in compiled graphs, then runs the module's own forward.

    Plain eager Python runs the float model. That is also what happens to a frame that Dynamo leaves eager inside
    torch.compile; then a warning says so once, and `eager_runs` counts it for `fxquant.explain`.

    Attributes:
        group, before: over which ranks and when ranges are reduced, as `fxquant.sync_ranges` sets it for
            `fxquant.ops.marks.bind`.
        root: of the prepared model.
        recurrent: whether the module is a recurrent layer, which Dynamo leaves to Python.
        python_runs: how often such a one ran quantized; ``functions`` did it.
    """

    SLOT: ClassVar[str] = "_fxquant_bound"
    CALL: ClassVar[Callable[..., Any]] = staticmethod(_bound_call)
    root: Root | None = None
    before: bool = False
    recurrent: bool = False
    python_runs: int = 0

    def __init__(self, module: nn.Module, root: Root) -> None:
        super().__init__(module)
        self.root = root
        self.group: str | None = None

    def bind_sites(self, sites: tuple[LocalSite, ...], target: str) -> None:
        """Takes the module's forward's place, for these sites."""
        self.sites, self.target = sites, target
        self.names = tuple(site.name for site in sites)
        self.key = register(sites, target)
        self.eager_runs = self.python_runs = 0
        self.functions: dict[Any, Any] = {}
        self.recurrent = isinstance(self.module, nn.RNNBase)
        LIVE.add(self)
        self.attach()

    def bind(self) -> None:
        """Makes the state of every site an input of the graph being traced."""
        quantizers: Any = self.module.quantizers
        modes, state = [], []
        for name in self.names:
            quantizer = quantizers[name]
            modes.append(int(quantizer.mode(self.module.training)))
            for kept in quantizer.names:  # an attribute: Dynamo traces a property for every site
                state.append(getattr(quantizer, kept))
        if state and type(state[0]) not in _PLAIN:  # Dynamo traces this for each owner
            refuse_sharded(state)
        bind(self.key, modes, state, self.group, self.before)

    def take_formats(self) -> None:
        """Binds the sites in the formats that the quantizers have now; graphs of others are compiled anew."""
        held: Any = self.module.quantizers
        self.sites = tuple(held[name].site for name in self.names)
        self.key = register(self.sites, self.target)

    def quantizers(self) -> Iterator[Quantizer]:
        """Those of the module."""
        found: Any = getattr(self.module, ATTRIBUTE, {})
        return iter(found.values())

    def detach(self) -> None:
        """The module is no part of a prepared model any more, whoever still holds this object."""
        super().detach()
        LIVE.discard(self)

    def note_eager(self) -> None:
        """Warns once where the owner was to be quantized and is float, and counts it."""
        if not self.names:
            return
        if in_compiled_region():
            refuse_sharded(value for quantizer in self.quantizers() for value in quantizer.state.values())
            how = "inside torch.compile"
            why = "Dynamo left its frame out: see TORCH_LOGS=graph_breaks,recompiles for why"
        elif any(is_compiled(module) for module in self.module.modules()):
            how = "around modules that are compiled"
            why = "Compile it as a whole, or leave them float: fxquant.override(model, {key: None})"
        else:
            if self.root is not None:
                self.root.note_eager_copy()
            return
        if self.eager_runs == 0:
            warnings.warn(
                f"{type(self.module).__name__} ran in eager Python {how}, so its {len(self.names)} quantized tensors "
                f"({', '.join(self.names[:4])}) stayed float. {why}.",
                NotQuantizedWarning,
                stacklevel=3,
            )
        self.eager_runs += 1

    def code_name(self) -> str:
        """Equal site lists on one class share a code object."""
        return f"{super().code_name()}.{self.key}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": {}}  # of tensors that another copy does not have

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An older version may have given its list another digest.
        super().__setstate__({**state, "key": register(state["sites"], state["target"]), "functions": {}})
        quantize_before_buckets()
        LIVE.add(self)


@functools.cache
def quantize_before_buckets() -> None:
    """Keeps `BUCKETS` in place from now on: torch looks for it before it calls a backend."""
    BUCKETS.put()


def bound_forward(module: nn.Module) -> BoundForward | None:
    """What `fxquant.prepare` put in the place of the module's forward, None for modules that own no quantizer."""
    found = BoundForward.of(module)
    return found if found is not None and found.active else None


def bound_forwards(model: nn.Module) -> dict[str, BoundForward]:
    """Owner path → what brings its state into graphs."""
    return {path: bound for path, module, _ in owners(model) if (bound := bound_forward(module)) is not None}
