"""Bars of the sites that a sensitivity report ranks first, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fxquant.errors import InvalidArgument
from fxquant.support.require import require

_NO_MATPLOTLIB = 'plot must have matplotlib to draw with: found none. Install it with: pip install "fxquant[report]"'
_COLORS = {"weight": "#0072B2", "activation": "#D55E00", "output": "#009E73"}  # Okabe and Ito, as in the demo
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "svg.hashsalt": "fxquant",  # equal reports give equal files
}


class Bar(Protocol):
    """What a bar shows of a site."""

    @property
    def key(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def alone(self) -> float: ...
    @property
    def rank(self) -> int: ...


def draw_bars(path: str | Path, bars: Sequence[Bar], every: float, measure: str) -> None:
    """Writes a bar for each site, colored by role, and a dashed line at the effect of ``every`` site together.

    Raises MissingDependency without matplotlib, InvalidArgument for a ``path`` that ends neither in .svg nor .png.
    """
    path = Path(path)
    form = path.suffix.lower().lstrip(".")
    if form not in ("svg", "png"):
        raise InvalidArgument(f"path must end in .svg or .png: got {path.name!r}.")
    figures = require("matplotlib.figure", _NO_MATPLOTLIB)
    with require("matplotlib", _NO_MATPLOTLIB).rc_context(_STYLE):
        figure = figures.Figure(figsize=(7.5, 0.19 * len(bars) + 1.4), layout="constrained")
        _compose(figure, bars, every, measure)
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(path, format=form, dpi=160, metadata=metadata)


def _compose(figure: Any, bars: Sequence[Bar], every: float, measure: str) -> None:
    axis = figure.subplots()
    for role, color in _COLORS.items():
        mine = [bar for bar in bars if bar.role == role]
        if mine:
            axis.barh([bar.rank for bar in mine], [bar.alone for bar in mine], color=color, height=0.75, label=role)
    axis.axvline(every, color="#555555", linewidth=1, linestyle="--", label="all sites together")
    axis.set_yticks([bar.rank for bar in bars], [bar.key for bar in bars], fontsize=7.5)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(bars) + 0.6, 0.4)
    axis.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
    unit = "‖y − y₀‖ / ‖y₀‖ of the output" if measure == "output error" else "loss above the float model's"
    axis.set_xlabel(f"{unit}, only this site quantized")
    figure.legend(loc="outside upper left", ncols=4)
