"""Parts of an SVG document: text, edges with tips, dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from fxquant.report.drawing.box import LETTER
from fxquant.report.operators import Wire

# Okabe and Ito's colours, which the colour-blind tell apart.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#5e3c99")
FLOAT_COLOUR = "#9a9a9a"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a drawing says about a site: its format, which gives the colour, and the lines of its tooltip."""

    spec: str
    lines: tuple[str, ...]


class Canvas:
    """The parts of a drawing in the making."""

    def __init__(self, shown: Mapping[str, Shown]) -> None:
        self.shown = shown
        formats = dict.fromkeys(one.spec for one in shown.values())
        self.colours = {spec: _PALETTE[i % len(_PALETTE)] for i, spec in enumerate(formats)}
        self.parts: list[str] = []
        self.width = 0.0

    def add(self, text: str) -> None:
        """Appends an element, or a part of one."""
        self.parts.append(text)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle", rest: str = "") -> None:
        """Words at a point, ``rest`` small after them; the page grows to hold them."""
        style = f' class="{kind}"' if kind else ""
        more = f'<tspan class="small">{escape(rest)}</tspan>' if rest else ""
        self.add(f'<text x="{px(x)}" y="{px(y)}" text-anchor="{anchor}"{style}>{escape(words)}{more}</text>')
        self.width = max(self.width, x + len(words) * LETTER * (1.0 if anchor == "start" else 0.5))

    def colour(self, wire: Wire) -> str:
        """That of the wire's format."""
        return self.colours[self.shown[wire.site].spec] if wire.site else FLOAT_COLOUR

    def edge(self, points: Sequence[tuple[float, float]], wire: Wire, about: str) -> None:
        """A polyline with a tip at its end; quantized ones carry their site and the edge of the plan."""
        colour, quantized = self.colour(wire), wire.site is not None
        data = f' data-site="{quote(wire.site or "")}"' if quantized else ""
        data += f' data-edge="{quote(wire.serves)}"' if wire.serves else ""
        lines = self.shown[wire.site].lines if wire.site else ("float",)
        line = " ".join(f"{px(x)},{px(y)}" for x, y in points)
        kind = "edge codes" if quantized else "edge"
        self.add(f"<g{data}>{title_element((*lines, about))}")
        self.add(f'<polyline class="{kind}" stroke="{colour}" points="{line}"/>')
        self.add(f'<path fill="{colour}" d="{_tip(points[-2], points[-1])}"/></g>')


def title_element(lines: Sequence[str]) -> str:
    """What a browser shows where the pointer rests."""
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _tip(before: tuple[float, float], end: tuple[float, float]) -> str:
    """A triangle at the end of an edge, along its last stretch."""
    dx, dy = end[0] - before[0], end[1] - before[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    dx, dy = dx / length, dy / length
    base = (end[0] - 7 * dx, end[1] - 7 * dy)
    corners = (end, (base[0] - 3.2 * dy, base[1] + 3.2 * dx), (base[0] + 3.2 * dy, base[1] - 3.2 * dx))
    return "M " + " L ".join(f"{px(x)} {px(y)}" for x, y in corners) + " Z"


def quote(text: str) -> str:
    """Text as the value of an attribute."""
    return escape(text, {'"': "&quot;"})


def px(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
