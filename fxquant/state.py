"""Quantizer modules on their owners, and the forward that brings their state into compiled graphs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.capture import in_compiled_region, own_code
from fxquant.errors import InvalidArgument, NotQuantizedWarning, PlanMismatch
from fxquant.ops.binding import bind
from fxquant.plan import LocalSite, Mode, Plan, register
from fxquant.spec import MovingAverage, QuantSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ATTRIBUTE = "quantizers"


class Quantizer(nn.Module):
    """State of one site: ``min_val`` and ``max_val`` (float32, one element, NaN until data was seen) if it has any.

    The tensors stay float32 under ``.half()``. Keys that a float checkpoint lacks are no error.

    Attributes:
        observing: in training, the range follows the data; else it stays.
        enabled: the tensor is quantized at all.
        resolved: the range is known to be set, so that graphs need not look at it.
        calibrating: the observing mode of a calibration in progress, None outside one.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, site: LocalSite) -> None:
        super().__init__()
        self.site = site
        self.observing = True
        self.enabled = True
        self.resolved = False
        self.calibrating: Mode | None = None
        if self.stateful:
            self.register_buffer("min_val", torch.full((1,), float("nan")))
            self.register_buffer("max_val", torch.full((1,), float("nan")))

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        return self.site.spec

    @property
    def stateful(self) -> bool:
        """Whether the range is kept between steps."""
        return self.site.spec.range.stateful

    @property
    def delayed(self) -> bool:
        """Whether training quantizes with the range before its update."""
        found = self.site.spec.range
        return isinstance(found, MovingAverage) and found.delayed

    def mode(self, training: bool) -> Mode:
        """What the site does in a graph traced now."""
        if not self.enabled:
            return Mode.OFF
        if self.calibrating is not None:
            return self.calibrating if self.stateful else Mode.OFF
        if not self.stateful:
            return Mode.STATIC
        if training and self.observing:
            if not self.delayed:
                return Mode.TRAIN
            return Mode.DELAYED if self.resolved else Mode.FIRST
        return Mode.STATIC if self.resolved else Mode.RESOLVE

    def settle(self) -> bool:
        """Looks (on the host) whether the range is set; remembers it if so."""
        self.resolved = not self.stateful or bool(torch.isfinite(self.min_val) & torch.isfinite(self.max_val))
        return self.resolved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                # A range rounded to half precision would move every code.
                self._buffers[name] = before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        local_metadata, strict, missing, unexpected, errors = args
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for name in self._buffers:
            if prefix + name in missing:
                missing.remove(prefix + name)
        self.settle()

    def extra_repr(self) -> str:
        """``u8, [-0.42, 3.1]``."""
        if not self.stateful:
            return str(self.spec)
        return f"{self.spec}, [{self.min_val.item():.4g}, {self.max_val.item():.4g}]"


class QuantizerSet(nn.ModuleDict):
    """The quantizers of one owner, by site name."""

    def __init__(self, sites: tuple[LocalSite, ...]) -> None:
        super().__init__({site.name: Quantizer(site) for site in sites})

    def forward(self, value: Any = None, *_: Any, **__: Any) -> Any:
        """The identity: an owner that runs all its children, as nn.Sequential does, runs its quantizers too."""
        return value


class Root:
    """What makes a module the root of a prepared model: its plan, saved with the module's state dict.

    Kept in the module's ``__dict__`` and not as a child: a prepared ``nn.Sequential`` keeps its length.
    """

    SLOT = "_fxquant_root"
    KEY = f"{ATTRIBUTE}.plan"  # in state dicts, so that one filter on "quantizers" leaves the float model's keys

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        _LIVE.add(self)

    def attach(self) -> None:
        """Puts the plan and its hooks on the module."""
        self.module.__dict__[Root.SLOT] = self
        self.module.register_state_dict_post_hook(_save_plan)
        self.module.register_load_state_dict_pre_hook(_refuse_other_plan)

    def detach(self) -> None:
        """Takes them off again."""
        del self.module.__dict__[Root.SLOT]
        for hooks in (self.module._state_dict_hooks, self.module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_save_plan, _refuse_other_plan):
                    del hooks[key]
        _LIVE.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _LIVE.add(self)


def _save_plan(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook of a root."""
    plan = plan_of(module)
    assert plan is not None
    state_dict[prefix + Root.KEY] = plan.to_json()


def _refuse_other_plan(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of a root: raises PlanMismatch before any tensor is copied; a float checkpoint has no plan."""
    saved, plan = state_dict.pop(prefix + Root.KEY, None), plan_of(module)
    if not saved or plan is None:
        return
    lines = plan.difference(Plan.from_json(saved))
    if lines:
        shown = "\n  ".join(lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise PlanMismatch(
            f"checkpoint must belong to the same plan as the model: {len(lines)} sites differ.\n  {shown}\n"
            "Prepare the model with the checkpoint's recipe and target, or drop the quantizers' keys to load the "
            "float weights only."
        )


class _Exporting:
    """Whether torch.export is tracing for `fxquant.export_onnx`; a user's own export sees the float model."""

    active = False


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Owners bind their state inside, as they do under Dynamo."""
    _Exporting.active = True
    try:
        yield
    finally:
        _Exporting.active = False


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
        self.group: str | None = None  # as `sync_ranges` sets it, for `fxquant.ops.binding.bind`
        _LIVE.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or _Exporting.active:
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
            if quantizer.stateful:
                state += [quantizer.min_val, quantizer.max_val]
        bind(self.key, modes, state, self.group)

    def quantizers(self) -> Iterator[Quantizer]:
        """Those of the module."""
        found: Any = getattr(self.module, ATTRIBUTE, {})
        return iter(found.values())

    def release(self) -> None:
        """The module is no part of a prepared model any more, whoever still holds this object."""
        _LIVE.discard(self)

    def _note_eager(self) -> None:
        if not self.names or not in_compiled_region():
            return
        if self.eager_runs == 0:
            warnings.warn(
                f"{type(self.module).__name__} ran in eager Python inside torch.compile, so its "
                f"{len(self.names)} quantized tensors ({', '.join(self.names[:4])}) stayed float. "
                "Dynamo left its frame out: see TORCH_LOGS=graph_breaks,recompiles for why.",
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
        function.__signature__ = shown.replace(parameters=[owner, *shown.parameters.values()])  # type: ignore[attr-defined]
        return types.MethodType(function, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.sites, self.target)
        _LIVE.add(self)


@functools.cache
def _code_for(name: str) -> types.CodeType:
    return own_code(BoundForward.__call__, name).__code__


_LIVE: weakref.WeakSet[BoundForward | Root] = weakref.WeakSet()


def bound_forward(module: nn.Module) -> BoundForward | None:
    """What `fxquant.prepare` put in the place of the module's forward, None for modules that own no quantizer."""
    found = getattr(module.__dict__.get("forward"), "__self__", None)
    return found if isinstance(found, BoundForward) else None


def settle_after(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, and a look on the host behind each call whether delayed ranges that it read are set now.

    For graphs that take a tensor's own range where none is stored. The ranges that are set make Dynamo take another
    graph at the next call, in which no quantizer waits for its tensor's extremes.
    """

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        given = {id(value) for value in inputs if isinstance(value, Tensor)}
        for part in list(_LIVE):
            if isinstance(part, BoundForward):
                for quantizer in part.quantizers():
                    if quantizer.stateful and not quantizer.resolved and id(quantizer.min_val) in given:
                        quantizer.settle()
        return outputs

    return run


def of_prepared_model(tensors: Iterable[Any]) -> bool:
    """Whether any of the tensors is a parameter of a prepared model that is alive."""
    known = {id(parameter) for part in _LIVE for parameter in part.module.parameters()}
    return any(id(tensor) in known for tensor in tensors)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of a prepared model, None for any other."""
    root = model.__dict__.get(Root.SLOT)
    return root.plan if isinstance(root, Root) else None


def require_plan(model: nn.Module, caller: str) -> Plan:
    """The plan, or an error that says to prepare first."""
    model = unwrap(model)
    plan = plan_of(model)
    if plan is None:
        raise InvalidArgument(
            f"{caller} must be given a prepared model: got {type(model).__name__} without a plan. "
            "Call fxquant.prepare(model, example_args) first."
        )
    return plan


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizerSet]]:
    """Every module that owns quantizers, with its path."""
    for path, module in model.named_modules():
        found = module._modules.get(ATTRIBUTE)
        if isinstance(found, QuantizerSet):
            yield path, module, found


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Site key → quantizer, in module order."""
    for path, _, found in owners(model):
        for name, quantizer in found.items():
            yield f"{path}.{name}" if path else name, quantizer  # type: ignore[misc]


def freeze_ranges(model: nn.Module, frozen: bool = True) -> None:
    """Holds every activation range where it is, in training too; ``frozen=False`` lets them follow the data again."""
    require_plan(model, "freeze_ranges")
    for _, quantizer in quantizers(unwrap(model)):
        quantizer.observing = not frozen
        quantizer.settle()


def sync_ranges(model: nn.Module, group: ProcessGroup | None = None, *, enabled: bool = True) -> None:
    """Says over which processes a prepared model's activation ranges are reduced in training.

    Without this call: over all of them, where ``torch.distributed`` is initialized with more than one. Each compiled
    graph that updates ranges then holds one ``all_reduce``, of the extremes of every tensor, so all ranks keep the
    ranges of the global batch. Every rank must so run the same graphs equally often. Where they do not, as in pipeline
    parallelism, name the ``group`` of ranks that do, or set ``enabled=False``: each rank then keeps its own.

    Calibration and evaluation reduce nothing. Graphs compiled before are compiled again at their next call.
    """
    require_plan(model, "sync_ranges")
    name = None if group is None else str(group.group_name)
    for _, module, _ in owners(unwrap(model)):
        bound = bound_forward(module)
        if bound is not None:
            bound.group = name if enabled else ""


class _FrozenTrain:
    """A BatchNorm's ``train`` that leaves it in eval mode: running statistics are used and kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, False)


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Normalizes with running statistics from now on, also in training; weight and bias keep training.

    QAT then trains exactly the folded network that is deployed. Survives ``model.train()``; ``frozen=False``
    gives every BatchNorm its model's mode back.
    """
    model = unwrap(model)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if frozen:
            module.__dict__["train"] = _FrozenTrain(module)
            module.eval()
        elif isinstance(module.__dict__.get("train"), _FrozenTrain):
            del module.__dict__["train"]
            module.train(model.training)
