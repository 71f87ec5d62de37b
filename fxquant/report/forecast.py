"""Which kernel a quantized operator of a plan is expected to become on the target.

For what a file really became, see `fxquant.verify_onnx` and ``python -m fxquant kernels``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fxquant.graph.kinds import KINDS
from fxquant.plan.plan import Edge, Plan, Site
from fxquant.spec.quant_spec import QuantSpec
from fxquant.targets.expected import FLOAT, WeightOnly
from fxquant.targets.registry import get_target

Place = tuple[str, str, int]  # of an operator: path of the module that runs it, kind, ordinal there
UNKNOWN = "not known"
_OPERANDS = {kind.name: tuple(kind.operands) for kind in KINDS.values()}
_WEIGHTS = {"linear": ("input", "weight"), "matmul": ("lhs", "rhs")}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator of the plan: the sites on its operands, by operand ("output" for its result).

    ``result`` says whether its result is quantized: None where no graph was looked at. ``why_float`` has the operands
    that are known to be float, with the plan's reason for it or an empty string.
    """

    place: Place
    sites: dict[str, Site] = field(default_factory=dict)
    result: bool | None = None
    why_float: dict[str, str] = field(default_factory=dict)


def absolute(site: Site, edge: Edge) -> Edge:
    """An edge of a site as the whole model names it."""
    return dataclasses.replace(edge, path=".".join(filter(None, (site.owner, edge.path))))


def place_of(edge: Edge) -> Place:
    """The operator of an absolute edge."""
    return edge.path, edge.kind, edge.ordinal


def operations(
    plan: Plan,
    results: Mapping[Place, bool] | None = None,
    served: Mapping[Place, Mapping[str, str]] | None = None,
) -> dict[Place, Operation]:
    """Every operator that a site of the plan serves.

    ``results`` and ``served`` are what a graph shows. Without them an operand that has no site counts as float only
    where the plan says why: it may read a result that has one, or be a weight that serves every call of its module.
    """
    found: dict[Place, Operation] = {}
    for site in plan.sites:
        for edge in site.local.edges:
            place = place_of(absolute(site, edge))
            operation = found.setdefault(place, Operation(place=place, result=(results or {}).get(place)))
            operation.sites.setdefault(edge.operand, site)
    by_key = {site.key: site for site in plan.sites}
    weight_only = all(site.local.role == "weight" for site in plan.sites)
    for place, operation in found.items():
        sources = {site.source for site in operation.sites.values()}
        for operand in _OPERANDS.get(place[1], ()):
            if operand in operation.sites:
                continue
            key = (served or {}).get(place, {}).get(operand)
            if key is not None:
                operation.sites[operand] = by_key[key]
                continue
            why = why_float(plan, place, sources, operand)
            if why or served is not None or weight_only:
                operation.why_float[operand] = why
        why = why_float(plan, place, sources, "output")
        if operation.result is False or (operation.result is None and why):
            operation.why_float["output"] = why  # without a graph it may be quantized all the same, by who reads it
    return found


def why_float(plan: Plan, place: Place, sources: Collection[str], operand: str) -> str:
    """What the plan says about an operand left in float; empty where it says nothing, or not whom it means.

    ``sources`` are the user's lines that the operator may stem from.
    """
    keys = _possible_keys(place, operand)
    prefix = f"its {operand}: "
    reasons = [d.reason for d in plan.declined if d.where in keys]
    if not reasons:
        about = dict.fromkeys(d.reason for d in plan.declined if d.source in sources and d.reason.startswith(prefix))
        # Several operators may stand on one line of the user's.
        reasons = list(about) if len(about) == 1 else []
    return reasons[0].removeprefix(prefix) if reasons else ""


def _possible_keys(place: Place, operand: str) -> set[str]:
    """Keys that a site on the operand could have had, before `fxquant.override` took it away."""
    path, kind, ordinal = place
    parts = path.split(".") if path else []
    keys = {".".join((*parts, operand))} if ordinal == 0 else set()
    for cut in range(len(parts) + 1):
        keys.add(".".join((*parts[:cut], "_".join((*parts[cut:], f"{kind}{ordinal}", operand)))))
    return keys


def expected_kernel(operation: Operation, operand: str, target: str) -> str:
    """The kernel that reads an operand of an operator, or ``"float: …"`` and why."""
    found, kind = get_target(target), operation.place[1]
    forecast = found.forecast
    kernel = forecast.kernels.get(f"{kind}.{operand}") or forecast.kernels.get(kind)
    if kernel is None:  # a plan of an older version may quantize what the target's profile refuses by now
        return f"{FLOAT}{found.profile.refused[kind]}" if kind in found.profile.refused else UNKNOWN
    if kernel.never:
        return f"{FLOAT}{kernel.never}"
    special = _of_weight(operation, forecast.weight_only)
    if special is not None:
        return special
    needs_result = kind in found.profile.needs_output
    needed = (_OPERANDS.get(kind, ()) if kernel.needs is None else kernel.needs) + ("output",) * needs_result
    for name in needed:
        if name == "output" and name in operation.why_float and operation.result is None:
            return f"{kernel.name} if all that reads its output is quantized"
        if name in operation.why_float:
            why = operation.why_float[name]
            return f"{FLOAT}its {name} is not quantized" + (f" ({why})" if why else "")
    read = {name: site for name, site in operation.sites.items() if name != "output" or needs_result}
    for name, site in read.items():
        bits = site.local.spec.bits
        if bits not in forecast.codes:
            return f"{FLOAT}its {name} has {bits}-bit codes"
    name = kernel.joined if kernel.joined and operation.result else kernel.name
    specs = [site.local.spec for site in read.values()]
    family = next((spec.family for spec in specs if spec.family), "")
    if family in forecast.families:
        return forecast.families[family].format(name=name)
    return name.format(code=_code(operation), kind=_kind(specs))


def _of_weight(operation: Operation, known: WeightOnly | None) -> str | None:
    """What becomes of a product whose weight alone is quantized, or has a scale per group; None for any other."""
    activation, weight = _WEIGHTS.get(operation.place[1], ("", ""))
    site = operation.sites.get(weight)
    if site is None or site.local.role != "weight" or known is None:
        return None
    size, alone = site.local.spec.group_size, activation in operation.why_float
    if not alone and site.local.spec.scale_format is not None:
        return None
    bits = 4 if site.local.spec.bits <= 4 and size is not None else 8
    words = {"bits": bits, "kind": f"int{bits}" if site.local.spec.element is None else _kind([site.local.spec])}
    if not alone:
        return None if size is None else known.beside.format(**words)
    if size is None:
        return known.name.format(**words) if known.channels else None
    if known.groups is not None and size not in known.groups:
        return f"{FLOAT}{known.name} has no groups of {size}"
    return known.name.format(**words)


def _kind(specs: Sequence[QuantSpec]) -> str:
    """``int8``, ``fp8`` or ``fp4``: what the widest operand's codes are."""
    widest = max(specs, key=lambda spec: spec.bits, default=None)
    return "int8" if widest is None or widest.element is None else f"fp{widest.bits}"


def _code(operation: Operation) -> str:
    """``u8`` or ``i8``, of the first operand that is an activation."""
    specs = [site.local.spec for site in operation.sites.values() if site.local.role == "activation"]
    return f"{'i' if not specs or specs[0].signed else 'u'}{specs[0].bits if specs else 8}"
