"""``curves.png``: for each net its loss, float then QAT, and below it how well each site keeps its tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.shell.demo.extras import require
from fxquant.shell.demo.job import Quantized, Trained
from fxquant.shell.demo.results import replaced

FLOAT = "#555555"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by everyone
MARKERS = ("o", "D", "s", "^")
FAINT = "#d9d9d9"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "xtick.color": "#555555",
    "ytick.color": "#333333",
    "legend.frameon": False,
}
TITLES = {"cnn": "Residual CNN", "vit": "Vision transformer"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One net's column: its float training and its runs, in order."""

    trained: Trained
    runs: Sequence[Quantized]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    with require("matplotlib").rc_context(STYLE), replaced(path) as temporary:
        compose(panels).savefig(temporary, dpi=160, format="png")


def compose(panels: Sequence[Panel]) -> Any:
    """The figure: a column for each net, as tall as its sites need, with one scale for all SQNRs."""
    sites = [rows(panel.runs) for panel in panels]
    lower = 0.165 * max([12, *map(len, sites)]) + 0.3
    figure = require("matplotlib.figure").Figure(figsize=(6.2 * len(panels), 2.9 + lower), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.02, wspace=0.04)
    axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=(2.4, lower))
    for axis in axes[1, 1:]:
        axis.sharex(axes[1, 0])  # before anything is drawn, so that the scale grows to hold every point
    for column, (panel, names) in enumerate(zip(panels, sites, strict=True)):
        loss_axis(axes[0, column], panel)
        sqnr_axis(axes[1, column], panel.runs, names)
    return figure


def loss_axis(axis: Any, panel: Panel) -> None:
    """The loss of each epoch on a logarithmic axis, fine-tuning continuing where float training stopped."""
    trained, start = panel.trained, len(panel.trained.curve)
    label = f"float {100 * trained.accuracy:.1f}"
    axis.semilogy(range(1, start + 1), trained.curve, color=FLOAT, linewidth=1.6, label=label)
    axis.axvline(start + 0.5, color=FAINT, linewidth=1, zorder=0)
    for index, run in enumerate(panel.runs):
        result = run.result
        label = f"{result.recipe} {100 * result.ptq_acc:.1f} → {100 * result.qat_acc:.1f}"
        epochs = range(start + 1, start + 1 + len(run.curve))
        axis.semilogy(
            epochs, run.curve, color=color(index), marker=MARKERS[index % 4], label=label,
            linewidth=1.4, markersize=3,
        )  # fmt: skip
    axis.set_title(TITLES.get(trained.net, trained.net), pad=30 + 14 * math.ceil((1 + len(panel.runs)) / 3))
    axis.set_xlabel("epoch, QAT after the line")
    axis.set_ylabel("training loss [nats]")
    axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.2, handlelength=1.6,
        columnspacing=1.4, title="held-out digits read correctly [%], PTQ → QAT", alignment="left",
    )  # fmt: skip


def sqnr_axis(axis: Any, runs: Sequence[Quantized], names: Sequence[tuple[str, str]]) -> None:
    """A point for each site and recipe, joined by a line; weights above, activations below."""
    for position, (key, _) in enumerate(names):
        if not key:
            axis.axhspan(position - 0.5, position + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
            continue
        values = [run.sqnr[key] for run in runs if math.isfinite(run.sqnr.get(key, math.nan))]
        if values:
            axis.plot([min(values), max(values)], [position, position], color=FAINT, linewidth=2, zorder=1)
    for index, run in enumerate(runs):
        shown = [(run.sqnr.get(key, math.nan), y) for y, (key, _) in enumerate(names) if key]
        finite = [(value, y) for value, y in shown if math.isfinite(value)]
        axis.scatter(
            [value for value, _ in finite], [y for _, y in finite],
            color=color(index), marker=MARKERS[index % 4], s=20, label=run.result.recipe, zorder=2,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), [name for _, name in names])
    for label, (key, _) in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontsize(7.5 if key else 8)
        label.set_fontweight("normal" if key else "bold")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axis.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("SQNR after QAT [dB], higher is closer to float")
    if any(run.sqnr for run in runs):
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs), borderpad=0, handletextpad=0.2)


def color(index: int) -> str:
    """A recipe's color, by its place."""
    return COLORS[index % len(COLORS)]


def rows(runs: Sequence[Quantized]) -> list[tuple[str, str]]:
    """(site key, readable name) from top to bottom, a heading with an empty key before each group."""
    keys = list(dict.fromkeys(key for run in runs for key in run.sqnr))
    weights = [key for key in keys if is_weight(key)]
    activations = [key for key in keys if not is_weight(key)]
    listed = []
    for heading, group in (("weights", weights), ("activations", activations)):
        if group:
            listed += [("", heading), *((key, readable(key)) for key in group)]
    return listed


def is_weight(key: str) -> bool:
    """Whether a site quantizes a parameter: its key ends in the parameter's name."""
    return key.rpartition(".")[2].endswith("weight")


def readable(key: str, longest: int = 34) -> str:
    """A site's key without what every key has; ``block1.conv1.quantizers.weight`` is ``block1.conv1``.

    A name that is too long loses its middle.
    """
    parts = [part for part in key.split(".") if part != "quantizers"]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    name = ".".join(parts)
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[-(longest - 1 - head) :]}"
