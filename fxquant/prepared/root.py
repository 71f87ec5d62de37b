"""What makes a module the root of a prepared model: its plan, saved with the module's state dict."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.aside import is_compiled
from fxquant.errors import InvalidArgument, NotQuantizedWarning, PlanMismatch
from fxquant.graph.frames import without_wrappers
from fxquant.plan.plan import Plan
from fxquant.prepared.frozen import freeze_as, frozen_flags
from fxquant.prepared.live import LIVE
from fxquant.prepared.quantizer import ATTRIBUTE, owners, planned_quantizers


class Root:
    """What makes a module the root of a prepared model: its plan, saved with the module's state dict.

    Kept in the module's ``__dict__`` and not as a child: a prepared ``nn.Sequential`` keeps its length. In state dicts
    stand the plan and what is frozen, as bytes under the paths of two buffers. These only hold the places: what is
    saved comes from the plan and the quantizers themselves, whatever an average of all buffers made of them.
    """

    SLOT = "_fxquant_root"
    PLAN = f"{ATTRIBUTE}_plan"  # one filter on "quantizers" leaves the float model's keys
    FROZEN = f"{ATTRIBUTE}_frozen"
    copied_compiled: bool = False
    told_replaced: bool = False
    told_unset: bool = False
    stage: str = ""  # of the schedule that drives the model, in words
    seen_stepped: bool = False  # an optimizer has stepped parameters of the module
    autocast: torch.dtype | None = None  # that a compiled training graph of the module ran under
    KEY_OF_0_1 = f"{ATTRIBUTE}.plan"  # held the plan as a str

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        self._text = _as_bytes(plan.to_json())
        LIVE.add(self)

    def attach(self) -> None:
        """Puts the plan and its hooks on the module."""
        self.module.__dict__[Root.SLOT] = self
        self.hold_places()
        self.module.register_state_dict_post_hook(_save_plan)
        self.module.register_load_state_dict_pre_hook(_refuse_other_plan)

    def detach(self) -> None:
        """Takes them off again."""
        del self.module.__dict__[Root.SLOT]
        for name in (Root.PLAN, Root.FROZEN):
            self.module._buffers.pop(name, None)
        for hooks in (self.module._state_dict_hooks, self.module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_save_plan, _refuse_other_plan):
                    del hooks[key]
        LIVE.discard(self)

    def hold_places(self) -> None:
        """Registers the buffers, which a model that version 0.1 pickled lacks."""
        for name, value in self.saved().items():
            if name not in self.module._buffers:
                self.module.register_buffer(name, value)

    def saved(self) -> dict[str, Tensor]:
        """What state dicts hold: tensors of their own, on the module's device."""
        held = self.module._buffers.get(Root.PLAN)
        device = next(self.module.parameters(), torch.empty(0)).device if held is None else held.device
        if self._text.device != device:
            self._text = self._text.to(device)
        flags = frozen_flags(self.module, self.plan.sites)
        return {Root.PLAN: self._text.clone(), Root.FROZEN: flags.to(device)}

    def take_formats(self) -> None:
        """Has what brings the sites into graphs know the formats that the quantizers have now."""
        parts: list[Any] = [part for part in LIVE if getattr(part, "root", None) is self]
        for part in parts:
            part.take_formats()

    def replaced(self) -> list[str]:
        """Keys of sites that stand no more where they stood: other layers are there, or they were moved elsewhere.

        A module that is not there at all, or is the identity now, has nothing to quantize.
        """
        modules = {without_wrappers(path): m for path, m in self.module.named_modules(remove_duplicate=False)}
        held = planned_quantizers(self.module)
        planned = {without_wrappers(site.key): without_wrappers(site.owner) for site in self.plan.sites}
        moved = bool(held.keys() - planned.keys())
        return [
            k for k, owner in planned.items() if k not in held and (moved or type(modules.get(owner)) not in _NOTHING)
        ]

    def present(self) -> Plan:
        """The plan without sites of modules that were taken out, and with paths as they are within wrappers."""
        held = planned_quantizers(self.module)
        found = [(site, held.get(without_wrappers(site.key))) for site in self.plan.sites]
        sites = tuple(dataclasses.replace(site, owner=now[0]) for site, now in found if now is not None)
        return dataclasses.replace(self.plan, sites=sites)

    def note_eager_copy(self) -> None:
        """Warns once in a copy of a model that was compiled in place, which torch leaves out of copies."""
        if not self.copied_compiled:
            return
        self.copied_compiled = False
        warnings.warn(
            f"this {type(self.module).__name__} is a copy of a model that was compiled in place; a copy is not, and "
            'runs in float. Call copy.compile(backend="fxquant"), or fxquant.strip(copy) if float is meant.',
            NotQuantizedWarning,
            stacklevel=4,
        )

    def __getstate__(self) -> dict[str, Any]:
        compiled = any(is_compiled(module) for module in self.module.modules())
        return {**self.__dict__, "copied_compiled": compiled or self.copied_compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_text" not in state:
            self._text = _as_bytes(self.plan.to_json())
        LIVE.add(self)


_NOTHING = (type(None), nn.Identity)


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _save_plan(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook of a root."""
    root = module.__dict__[Root.SLOT]
    root.hold_places()
    state_dict.update({prefix + name: value for name, value in root.saved().items()})


def _refuse_other_plan(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of a root: raises PlanMismatch before any tensor is copied; a float checkpoint has no plan."""
    root = module.__dict__[Root.SLOT]
    saved = _saved_plan(state_dict.pop(prefix + Root.KEY_OF_0_1, None) or state_dict.get(prefix + Root.PLAN))
    flags = state_dict.get(prefix + Root.FROZEN)
    if saved is not None:
        _check_same(root.plan, saved)
        if flags is not None:
            freeze_as(module, root.plan.sites, _integers(flags))
            root.take_formats()
    root.hold_places()
    state_dict.update({prefix + name: value for name, value in root.saved().items()})


def _saved_plan(found: str | Tensor | None) -> Plan | None:
    """The plan of a checkpoint; None for one of a float model, and for one without values."""
    if found is None or len(found) == 0 or (isinstance(found, Tensor) and found.is_meta):
        return None
    try:
        return Plan.from_json(found if isinstance(found, str) else bytes(_integers(found)).decode())
    except (ValueError, KeyError, TypeError) as error:
        raise PlanMismatch(
            f"checkpoint's {Root.PLAN} must be a plan as it was saved: got {len(found)} bytes of something else "
            f"({type(error).__name__}). Leave out the key to load the tensors without a check."
        ) from error


def _integers(codes: Tensor) -> list[int]:
    """Of bytes that a cast or an average of all tensors may have made floats."""
    found: list[int] = (codes.round() if codes.is_floating_point() else codes).to(torch.uint8).tolist()
    return found


def _check_same(plan: Plan, saved: Plan) -> None:
    lines = plan.difference(saved)
    if lines:
        shown = "\n  ".join(lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise PlanMismatch(
            f"checkpoint must belong to the same plan as the model: {len(lines)} sites differ.\n  {shown}\n"
            "Prepare the model with the checkpoint's recipe and target, or drop the quantizers' keys to load the "
            "float weights only."
        )


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of a prepared model, None for any other."""
    root = model.__dict__.get(Root.SLOT)
    return root.plan if isinstance(root, Root) else None


def require_plan(model: nn.Module, caller: str) -> Plan:
    """The plan of what is there, or an error that says to prepare first."""
    model = unwrap(model)
    root = model.__dict__.get(Root.SLOT)
    if not isinstance(root, Root):
        part = next((path or "itself" for path, _, _ in owners(model)), None)
        raise InvalidArgument(
            f"{caller} must be given a prepared model: got {type(model).__name__} without a plan. "
            "Call fxquant.prepare(model, example_args) first."
            if part is None
            else f"{caller} must be given a prepared model: got {type(model).__name__}, a part of one or what was "
            f"merged from it ({part} has quantizers). Give the whole, or fxquant.strip the model and prepare it again."
        )
    replaced = root.replaced()
    if replaced:
        raise InvalidArgument(
            f"{caller} must be given a model whose layers are those that were prepared: got others in the place of "
            f"{len(replaced)} sites ({_names(replaced)}). Call fxquant.strip(model), and prepare it again."
        )
    return root.present()


def warn_of_replaced(inputs: Iterable[object]) -> None:
    """Names, once for each model of whose parameters some are inputs of a graph, its sites that others replaced."""
    given = set(map(id, inputs))
    for root in [part for part in LIVE if isinstance(part, Root) and not part.told_replaced]:
        if given.isdisjoint(map(id, root.module.parameters())):
            continue
        replaced = root.replaced()
        if replaced:
            root.told_replaced = True
            warnings.warn(
                f"{len(replaced)} quantized tensors of {type(root.module).__name__} are not where they were prepared, "
                f"and what stands in their place is float: {_names(replaced)}. Call fxquant.strip(model), and prepare "
                "it again.",
                NotQuantizedWarning,
                stacklevel=2,
            )


def roots_of(inputs: Iterable[object]) -> list[Root]:
    """The prepared models of whose parameters some are inputs of a graph."""
    given = set(map(id, inputs))
    roots = [part for part in LIVE if isinstance(part, Root)]
    return [root for root in roots if not given.isdisjoint(map(id, root.module.parameters()))]


def note_autocast(inputs: Iterable[object], dtype: torch.dtype) -> None:
    """Remembers, on each model of whose parameters some are inputs of a graph, the autocast that it trains under."""
    for root in roots_of(inputs):
        root.autocast = dtype


def trained_autocast(model: nn.Module) -> torch.dtype | None:
    """The autocast that a prepared model was trained under in this process, or before it was pickled or copied."""
    root = model.__dict__.get(Root.SLOT)
    return root.autocast if isinstance(root, Root) else None


def stage_of(model: nn.Module) -> str:
    """Where the schedule that drives a prepared model is; "" without one."""
    root = model.__dict__.get(Root.SLOT)
    return root.stage if isinstance(root, Root) else ""


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner
