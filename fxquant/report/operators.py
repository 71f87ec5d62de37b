"""The operators of a prepared model's graphs, with the sites on what they read: plain data, to be drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from fxquant.graph.kinds import kind_of
from fxquant.graph.nodes import packet
from fxquant.plan.plan import FloatPlace
from fxquant.report.forecast import Place


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One tensor that goes into an operator.

    Attributes:
        operand: which, as in `fxquant.graph.kinds.KINDS`; empty for arguments that no quantizer can stand on.
        source: index of the operator that makes it; None for a parameter or constant.
        site: key of the quantizer whose codes it carries, None for float.
        serves: the edge of the plan that it is, as the whole model names it; empty on the way there.
    """

    operand: str
    source: int | None
    site: str | None = None
    serves: str = ""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One call of a graph, an input of it (role "input") or what it gives back ("output").

    ``place`` tells which operator of the plan it is, None for those that no site serves; ``head`` the one whose kernel
    it is a part of, as a BatchNorm of its convolution's; ``kernel`` what it is expected to become; ``declined`` why
    the solver left it, or a part of it, in float.
    """

    role: Literal["input", "operator", "mover", "output"]
    label: str
    name: str
    module: str = ""
    source: str = ""
    place: Place | None = None
    head: Place | None = None
    kernel: str = ""
    declined: tuple[str, ...] = ()
    wires: tuple[Wire, ...] = ()


def label_of(node: fx.Node) -> str:
    """What to call an operator: its kind, or ATen's name."""
    kind = kind_of(node)
    if kind is not None:
        return kind.name
    target = packet(node)
    return getattr(target, "__name__", str(target)).rsplit(".", 1)[-1]


def declines_of(declined: Iterable[FloatPlace]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(operator, source line) → reasons."""
    reasons: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in declined:
        reasons[one.where, one.source] = (*reasons.get((one.where, one.source), ()), one.reason)
    return reasons
