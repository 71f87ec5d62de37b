"""Parameters of learned ranges and the optimizers that are to step them."""

from __future__ import annotations

import functools
import gc
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.prepared.live import LIVE
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import Root, require_plan, unwrap


def parameter_groups(
    model: nn.Module, lr: float | None = None, *, scale_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a prepared model as groups for an optimizer: the model's own, and its learned ranges.

    Ranges get no weight decay, which would pull every scale towards 0. What is not given is left to the optimizer.

    >>> optimizer = torch.optim.AdamW(fxquant.parameter_groups(model, lr=1e-3, scale_lr=1e-4, weight_decay=0.01))

    Args:
        model: prepared; where no range is learned, there is one group.
        lr: learning rate of the model's own parameters.
        scale_lr: that of learned ranges; ``lr`` by default.
        weight_decay: of the model's own parameters.

    Raises InvalidArgument for a model that is not prepared, a rate or decay that is no number of at least 0.
    """
    require_plan(model, "parameter_groups")
    for name, value in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        if value is not None and not (isinstance(value, (int, float, Tensor)) and 0 <= float(value) < math.inf):
            raise InvalidArgument(f"{name} must be a number of at least 0, or None: got {value!r}.")
    ranges = {id(p): p for p in range_parameters(unwrap(model)).values()}
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in ranges]
    trained = [p for p in ranges.values() if p.requires_grad]
    found = [_group(own, lr, weight_decay)]
    if trained:
        found.append(_group(trained, lr if scale_lr is None else scale_lr, 0.0))
    return found


def _group(parameters: list[nn.Parameter], lr: float | None, weight_decay: float | None) -> dict[str, Any]:
    given = {"lr": lr, "weight_decay": weight_decay}
    return {"params": parameters, **{name: value for name, value in given.items() if value is not None}}


def range_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of learned ranges, by site key and name: ``up.weight.scale``."""
    return {f"{key}.{name}": p for key, q in quantizers(model) for name, p in q.named_parameters()}


@functools.cache
def watch_optimizers() -> RemovableHandle:
    """From now on a step that leaves learned ranges out is told, once for each model."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    return register_optimizer_step_post_hook(_look_at_step)


def unwatch_optimizers() -> None:
    """Takes the hook away, until the next model with learned ranges is prepared."""
    watch_optimizers().remove()
    watch_optimizers.cache_clear()


def _look_at_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    roots = [part for part in LIVE if isinstance(part, Root) and not part.seen_stepped]
    if not roots:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for root in roots:
        if any(id(p) in stepped for p in root.module.parameters()):
            root.seen_stepped = True
            _tell_missing(root.module, stepped)


def _tell_missing(model: nn.Module, stepped: set[int]) -> None:
    """Warns of ranges that are trained and that no optimizer holds, be it another than the one that stepped."""
    trained = {name: p for name, p in range_parameters(model).items() if p.requires_grad}
    absent = [name for name, p in trained.items() if id(p) not in stepped and not _is_in_an_optimizer(p)]
    if absent:
        names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        warnings.warn(
            f"{len(absent)} of {len(trained)} learned ranges of {type(model).__name__} are in no optimizer, and stay "
            f"what they started with: {names}. Make the optimizer after fxquant.prepare, from model.parameters() or "
            "fxquant.parameter_groups(model), or hold them with fxquant.freeze_ranges(model).",
            NotQuantizedWarning,
            stacklevel=4,
        )


def _is_in_an_optimizer(parameter: nn.Parameter) -> bool:
    """Whether a group of any optimizer holds a parameter: by what refers to it, which is asked of absent ones only."""
    held = [parameters for parameters in gc.get_referrers(parameter) if type(parameters) is list]
    groups = [group for each in held for group in gc.get_referrers(each) if type(group) is dict and "params" in group]
    lists = [found for each in groups for found in gc.get_referrers(each) if type(found) is list]
    holders = [holder for each in lists for holder in gc.get_referrers(each)]
    # An object's attributes are a dict, or since Python 3.11 perhaps the object's own.
    return any(isinstance(each, torch.optim.Optimizer) or _is_of_optimizer(each) for each in holders)


def _is_of_optimizer(attributes: object) -> bool:
    return type(attributes) is dict and {"param_groups", "state", "defaults"} <= attributes.keys()
