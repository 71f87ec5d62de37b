"""What makes a module the root of a prepared model: its plan, saved with the module's state dict."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.errors import InvalidArgument, PlanMismatch
from fxquant.plan.plan import Plan
from fxquant.prepared.live import LIVE
from fxquant.prepared.quantizer import ATTRIBUTE


class Root:
    """What makes a module the root of a prepared model: its plan, saved with the module's state dict.

    Kept in the module's ``__dict__`` and not as a child: a prepared ``nn.Sequential`` keeps its length.
    """

    SLOT = "_fxquant_root"
    KEY = f"{ATTRIBUTE}.plan"  # in state dicts, so that one filter on "quantizers" leaves the float model's keys

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        LIVE.add(self)

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
        LIVE.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        LIVE.add(self)


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
