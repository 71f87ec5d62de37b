"""What stages make of a plan, stage by stage, and what they must not ask for."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from dataclasses import dataclass

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan, Site
from fxquant.prepared.staged import Staged
from fxquant.training.damping import check_damped
from fxquant.training.stage import Stage, What


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The state of a training in one stage.

    Attributes:
        sites: what each site does, by key.
        damped: factor of the damping of each weight that has one, by key.
        freeze_ranges, freeze_batch_norm: whether they are held; None where no stage has said so far.
    """

    sites: dict[str, Staged]
    damped: dict[str, float]
    freeze_ranges: bool | None = None
    freeze_batch_norm: bool | None = None


def begins(stages: tuple[Stage, ...], total: int | None) -> tuple[int, ...]:
    """How many steps are done before each stage; InvalidArgument where they are out of order."""
    wrong = next((stage for stage in stages if not isinstance(stage, Stage)), None)
    if wrong is not None or not stages:
        raise InvalidArgument(f"stages must be fxquant.Stage objects, at least one: got {wrong!r}.")
    found = tuple(stage.begins(total, f"stages[{number}]") for number, stage in enumerate(stages))
    for number, (one, after) in enumerate(itertools.pairwise(found), 1):
        if after <= one:
            raise InvalidArgument(
                "stages must be in order, each from a later step on: "
                f"got stages[{number}] at {after} after one at {one}. A float is a share of total_steps."
            )
    if total is not None and found[-1] > total:
        raise InvalidArgument(
            f"stages must begin within total_steps={total}: got stages[{len(found) - 1}] at {found[-1]}."
        )
    return found


def resolved(model: nn.Module, plan: Plan, stages: tuple[Stage, ...]) -> list[Resolved]:
    """The state before the first stage, and in each.

    Raises InvalidArgument where a stage names no site, asks of its sites what they cannot do, or the last one leaves
    some otherwise than the plan.
    """
    as_planned = {site.key: Staged(doing="quantize", spec=site.local.spec) for site in plan.sites}
    found = [Resolved(sites=as_planned, damped={})]
    for number, stage in enumerate(stages):
        found.append(_after(model, plan, found[-1], stage, f"stages[{number}]"))
    left = [key for key, staged in found[-1].sites.items() if staged != as_planned[key]]
    if left:
        raise InvalidArgument(
            f"stages must end with every site as the plan has it: got {len(left)} that are not "
            f"({', '.join(left[:6])}). End with weights='quantize' and activations='quantize'; fxquant.override "
            "changes the plan."
        )
    return found


def _after(model: nn.Module, plan: Plan, before: Resolved, stage: Stage, where: str) -> Resolved:
    sites, damped = dict(before.sites), dict(before.damped)
    for name in ("weights", "activations"):
        what = getattr(stage, name)
        if what is not None:
            named = _named(plan, stage, name, f"{where}.{name}")
            _check(named, what, f"{where}.{name}")
            sites |= {site.key: _staged(site, what) for site in named}
    if stage.damping is not None:
        weights = _named(plan, stage, "weights", f"{where}.damping")
        check_damped(model, weights, where)
        damped |= {site.key: stage.damping for site in weights}
    said = {name: getattr(stage, name) for name in ("freeze_ranges", "freeze_batch_norm")}
    kept = {name: getattr(before, name) if value is None else value for name, value in said.items()}
    return Resolved(sites=sites, damped=damped, **kept)


def _named(plan: Plan, stage: Stage, name: str, where: str) -> list[Site]:
    """The weights, or the other sites, that a stage speaks of."""
    sites = [site for site in plan.sites if (site.local.role == "weight") == (name == "weights")]
    named = [site for site in sites if fnmatch.fnmatchcase(site.key, stage.sites)]
    if not named:
        known = ", ".join(site.key for site in sites[:6]) or "none"
        raise InvalidArgument(
            f"{where} must be said of a site: got sites={stage.sites!r}, which names none. The plan's {name}: {known}."
        )
    return named


def _check(named: list[Site], what: What, where: str) -> None:
    first = named[0].local.spec
    if what == "observe" and not any(site.local.spec.range.stateful for site in named):
        raise InvalidArgument(
            f"{where} must not be 'observe' where no range follows the data: got {len(named)} sites with "
            f"{first.range}. Leave them 'float', or 'quantize' them."
        )
    if isinstance(what, int) and all(_staged(site, what).spec == site.local.spec for site in named):
        raise InvalidArgument(
            f"{where} must be more bits than an integer format of the plan has: got {what}, and {named[0].key} has "
            f"{first}. Prepare with the formats that are deployed; stages lead to them."
        )


def _staged(site: Site, what: What) -> Staged:
    spec = site.local.spec
    if not isinstance(what, int):
        return Staged(doing=what, spec=spec)
    if spec.element is not None:  # small floats have the width that they have
        return Staged(doing="quantize", spec=spec)
    return Staged(doing="quantize", spec=dataclasses.replace(spec, bits=max(spec.bits, what)))
