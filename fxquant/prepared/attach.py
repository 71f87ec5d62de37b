"""A plan, its quantizers and the forwards that bind them, put on a model and taken off again."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.errors import UnsupportedModel
from fxquant.plan.plan import Plan, Site
from fxquant.prepared.bound_forward import BoundForward, bound_forward, quantize_before_buckets
from fxquant.prepared.live import LIVE
from fxquant.prepared.optimizers import watch_optimizers
from fxquant.prepared.quantizer import ATTRIBUTE, QuantizerSet, owners
from fxquant.prepared.root import Root
from fxquant.prepared.unfused import attach_unfused, detach_unfused

_TAKEN = "{owner} must not have an attribute {name!r} of its own: fxquant keeps state there. Rename it."


def detach(model: nn.Module) -> None:
    """Undoes `attach`, however far it came."""
    for _, module, _ in list(owners(model)):
        bound = bound_forward(module)
        if bound is not None:
            bound.detach()
            if bound.root is not None:  # of what the model was merged out of, which is no prepared model any more
                LIVE.discard(bound.root)
        delattr(module, ATTRIBUTE)
    detach_unfused(model)
    for module in model.modules():
        root = module.__dict__.get(Root.SLOT)
        if root is not None:
            root.detach()


@torch.inference_mode(False)
def attach(model: nn.Module, plan: Plan) -> None:
    """Puts a plan, its quantizers and the forwards that bind them on a model; `detach` undoes it.

    Their tensors are trained and updated later, so they are no inference tensors, whoever prepares.
    """
    by_owner = plan.owners()
    modules = dict(model.named_modules())
    for path in by_owner:
        if hasattr(modules[path], ATTRIBUTE):
            raise UnsupportedModel(_TAKEN.format(owner=path or "model", name=ATTRIBUTE))
    taken = next((name for name in (Root.PLAN, Root.FROZEN) if hasattr(model, name)), None)
    if taken is not None:
        raise UnsupportedModel(_TAKEN.format(owner="model", name=taken))
    quantize_before_buckets()
    root = Root(model, plan)
    root.attach()
    attach_unfused(model)
    if any(site.local.spec.range.trained for site in plan.sites):
        watch_optimizers()
    devices = {path: next(modules[path].parameters(), torch.empty(0)).device for path in by_owner}
    for path, sites in by_owner.items():
        locals_ = tuple(site.local for site in sites)
        modules[path].add_module(ATTRIBUTE, QuantizerSet((s.local, _scales(s)) for s in sites).to(devices[path]))
        bound = BoundForward.of(modules[path]) or BoundForward(modules[path], root)
        bound.root = root
        bound.bind_sites(locals_, plan.target)


def _scales(site: Site) -> int:
    """How many scales a quantizer keeps; raises UnsupportedModel where the plan does not know."""
    if not site.local.spec.range.stateful:
        return 1
    if site.scales is None:
        raise UnsupportedModel(
            f"weight of {site.key} must be of fixed size for a range that is kept per channel: got a plan without it. "
            "Prepare the model again, or give the site range=fxquant.CurrentTensor() or axis=None."
        )
    return site.scales
