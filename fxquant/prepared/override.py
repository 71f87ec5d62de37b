"""`override`: another format for single sites of a prepared model, or none."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.plan.plan import FloatPlace, Plan, Site
from fxquant.prepared.attach import attach, detach
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import Quantizer, quantizers
from fxquant.prepared.root import require_plan, unwrap
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.recipes import check_spec
from fxquant.spec.rules import some
from fxquant.targets.profiles import Profile, get_profile


def override(model: nn.Module, changes: Mapping[str, QuantSpec | None]) -> nn.Module:
    """Gives sites of a prepared model another format, or leaves them in float, in place; returns the model.

    ``changes`` maps globs over site keys, as `explain` shows them, to a format or None; the first that matches a
    site decides. A format per channel or per group runs along the channels of each operator. Ranges that were found
    stay, also under another number of bits. Graphs compiled before are compiled again at their next call. A
    checkpoint of the model before belongs to another plan.

    >>> override(model, {"stem.*": None, "*.weight": QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())})

    Raises:
        InvalidArgument: a model without plan, a pattern that matches no site, a format that the site cannot have, or
            nothing left to quantize; the model is then as it was.
    """
    plan = require_plan(model, "override")
    model = unwrap(model)
    changed = _changed(plan, dict(changes))
    before = dict(quantizers(model))
    synced = {path: (bound.group, bound.before) for path, bound in bound_forwards(model).items()}
    try:
        detach(model)
        attach(model, changed)
    except BaseException:
        detach(model)
        attach(model, plan)
        raise
    finally:
        for key, quantizer in quantizers(model):
            _take_over(quantizer, before[key])
        for path, bound in bound_forwards(model).items():
            bound.group, bound.before = synced[path]
    return model


def _changed(plan: Plan, changes: dict[str, QuantSpec | None]) -> Plan:
    sites: list[Site] = []
    declined = list(plan.declined)
    used: set[str] = set()
    for site in plan.sites:
        pattern = next((p for p in changes if fnmatch.fnmatchcase(site.key, p)), None)
        if pattern is None:
            sites.append(site)
            continue
        used.add(pattern)
        spec = changes[pattern]
        if spec is None:
            reason = f"left in float by override({pattern!r})"
            declined.append(FloatPlace(where=site.key, reason=reason, source=site.source))
            continue
        sites.append(_with_spec(site, spec, pattern, get_profile(plan.target)))
    _check_used(plan, changes, used)
    if not sites:
        raise InvalidArgument("changes must leave a site to quantize: got none. fxquant.strip gives the float model.")
    return dataclasses.replace(plan, sites=tuple(sites), declined=tuple(declined))


def _with_spec(site: Site, spec: QuantSpec, pattern: str, profile: Profile) -> Site:
    if not isinstance(spec, QuantSpec):
        raise InvalidArgument(f"changes[{pattern!r}] must be a QuantSpec, or None for float: got {spec!r}.")
    check_spec(site.local.role, spec, f"changes[{pattern!r}]")
    if spec.family:
        profile.check_format(site.local.role, spec, f"changes[{pattern!r}]")
    if site.local.role != "weight":
        if profile.fit(spec, is_positive=True) != spec:
            raise InvalidArgument(
                f"changes[{pattern!r}] must have signed and symmetric codes for target {profile.name!r}: got {spec}."
            )
        spec = profile.rounded(spec)
    if spec.group_size is not None and site.local.role != "weight":
        raise InvalidArgument(
            f"changes[{pattern!r}] must not be per token or group for {site.key}: got {spec} for an activation, whose "
            "place follows from its format. Prepare the model with fxquant.Rule(operand='input', spec=…) or a recipe."
        )
    if spec.group_size is not None:
        spec = dataclasses.replace(spec, axis=_group_axis(site, spec.group_size, pattern))
        profile.check_format("weight", spec, f"changes[{pattern!r}]")
    elif site.local.role == "weight" and spec.axis is not None:
        spec = dataclasses.replace(spec, axis=site.local.spec.axis)  # per channel means the operator's own axis
    reason = f"{site.reason}; format by override({pattern!r})"
    return dataclasses.replace(site, local=dataclasses.replace(site.local, spec=spec), reason=reason)


def _group_axis(site: Site, size: int, pattern: str) -> int:
    """The channel axis of a weight that can have groups of this size."""
    if site.matrix is None:
        kinds = ", ".join(dict.fromkeys(edge.kind for edge in site.local.edges))
        raise InvalidArgument(
            f"changes[{pattern!r}] must not be per group for {site.key}: got groups of {size} for the weight of {kinds}"
            ", and only matrices have them. Name the sites of linear layers."
        )
    axis, length = site.matrix
    if length % size:
        raise InvalidArgument(
            f"changes[{pattern!r}] must have groups that divide the {length} values of a channel of {site.key}: "
            f"got {size}."
        )
    return axis


def _check_used(plan: Plan, changes: Mapping[str, QuantSpec | None], used: set[str]) -> None:
    keys = [site.key for site in plan.sites]
    for pattern in changes:
        if pattern not in used:
            near = difflib.get_close_matches(pattern, keys, n=3, cutoff=0.5)
            raise InvalidArgument(
                f"changes must each match a site: got none for {pattern!r} (or an earlier pattern took all it matches)."
                f" Sites: {', '.join(near) if near else some(keys)}."
            )


def _take_over(quantizer: Quantizer, old: Quantizer) -> None:
    """State of the quantizer that stood there before."""
    quantizer.enabled, quantizer.doing = old.enabled, old.doing
    state = quantizer.state
    shared = {name: kept for name, kept in old.state.items() if name in state and _is_like(kept, state[name])}
    found = quantizer.range.converted(shared, old.spec, quantizer.spec)
    with torch.no_grad():
        for name, kept in shared.items():
            kept.copy_(state[name] if found is None else found[name])
            setattr(quantizer, name, kept)  # the tensor itself: an optimizer may know it
    quantizer.let_move(old.observing)
    quantizer.train(old.training)
    quantizer.settle()


def _is_like(kept: Tensor, value: Tensor) -> bool:
    return (kept.shape, type(kept)) == (value.shape, type(value))
