"""The boxes of a drawing: what is written in them, and how large that makes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxquant.report.operators import Operator, Wire
from fxquant.targets.expected import FLOAT

LETTER, SMALL_LETTER = 7.6, 6.1  # mean widths at the two font sizes
STUB = 30.0  # length of the line that stands for a parameter
_BIG, _SMALL = 36.0, 18.0  # heights


@dataclass(kw_only=True)
class Box:
    """A vertex of the layout: an operator, or (without one) the bend of an edge that passes a layer."""

    operator: Operator | None = None
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    left: float = 0.0  # room kept free on the left, for parameters
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Path:
    """An edge through the layers: its boxes from top to bottom, and the wire it is."""

    boxes: tuple[int, ...]
    wire: Wire


def box_of(operator: Operator) -> Box:
    """A box that holds the operator's words, with room for its parameters."""
    stubs = sum(wire.source is None for wire in operator.wires)
    if operator.role == "mover":
        return Box(operator=operator, width=len(operator.label) * SMALL_LETTER + 14, height=_SMALL)
    headline = len(operator.label) * LETTER + len(kernel_words(operator)) * SMALL_LETTER
    width = max(headline, len(module_words(operator)) * SMALL_LETTER, 56.0) + 18
    return Box(operator=operator, width=width, height=max(_BIG, 12.0 * stubs), left=STUB if stubs else 0.0)


def kernel_words(operator: Operator) -> str:
    """The kernel in words that fit into the box; empty where it reads no codes, or is another operator's."""
    kernel = operator.kernel.split(" + ")[0].split(" (")[0]
    return "" if not kernel or kernel.startswith(("part of ", FLOAT)) else f"\u00a0→ {kernel}"


def module_words(operator: Operator) -> str:
    """The module, of a long path its end."""
    return operator.module if len(operator.module) <= 30 else f"…{operator.module[-29:]}"
