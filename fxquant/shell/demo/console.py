"""What the demo prints: progress bars and a table through rich, or plain lines where that is not possible."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from fxquant.shell.demo.results import Result

COLUMNS = (
    "net", "recipe", "float %", "PTQ %", "QAT %", "ONNX %",
    "differing codes", "integer share", "latency ratio",
)  # fmt: skip


class Console:
    """Lines, bars and the final table on ``stream``.

    Bars move only where ``stream`` is a terminal and rich is installed; elsewhere, and without ``bars``, a stage prints
    a line at every quarter, so that a log, or what several processes print, stays readable.
    """

    def __init__(self, stream: TextIO | None = None, *, bars: bool = True) -> None:
        self.stream, self.bars = stream or sys.stdout, bars
        self.rich: Any = None
        try:
            from rich.console import Console as RichConsole
        except ModuleNotFoundError:
            return
        terminal = self.stream.isatty()
        self.rich = RichConsole(file=self.stream, highlight=False, width=None if terminal else 110)

    def say(self, text: str) -> None:
        """One line of plain text."""
        print(text, file=self.stream, flush=True)

    def stage(self, title: str, text: str) -> None:
        """What a stage came to, in a line that starts where a bar's does."""
        self.say(f"{title:<18} {text}")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[float], None]]:
        """A progress bar of ``total`` steps; call what it yields with each step's loss."""
        if self.bars and self.rich is not None and self.rich.is_terminal:
            with self._moving_bar(title, total) as advance:
                yield advance
        else:
            yield self._lines(title, total)

    @contextmanager
    def _moving_bar(self, title: str, total: int) -> Iterator[Callable[[float], None]]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        progress = Progress(
            SpinnerColumn(), TextColumn(f"{title:<18}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=self.rich,
        )  # fmt: skip
        with progress:
            task = progress.add_task(title, total=total, note="compiling or warming up")

            def advance(loss: float) -> None:
                progress.update(task, advance=1, note=f"loss {loss:.3f}")

            yield advance

    def _lines(self, title: str, total: int) -> Callable[[float], None]:
        done = 0
        marks = {math.ceil(total * quarter / 4) for quarter in range(1, 5)}

        def advance(loss: float) -> None:
            nonlocal done
            done += 1
            if done in marks:
                self.say(f"{title:<18} {done:>5}/{total}  loss {loss:.3f}")

        return advance

    def table(self, results: Sequence[Result]) -> None:
        """The results, one row for each net and recipe."""
        rows = [cells(result) for result in results]
        if self.rich is None:
            widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
            for row in (COLUMNS, *rows):
                self.say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
            return
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title="Held-out digits read correctly",
            title_justify="left",
        )
        for index, name in enumerate(COLUMNS):
            justify: Literal["left", "right"] = "left" if index < 2 else "right"
            table.add_column(name.replace(" ", "\n"), justify=justify, vertical="bottom")
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)


def cells(result: Result) -> tuple[str, ...]:
    """One table row: accuracies in per cent, codes that differ of codes compared."""
    accuracies = (result.float_acc, result.ptq_acc, result.qat_acc, result.onnx_acc)
    return (
        result.net,
        result.recipe,
        *(f"{100 * accuracy:.1f}" for accuracy in accuracies),
        f"{result.differing_codes:,} / {result.compared_codes:,}",
        f"{100 * result.integer_share:.0f} %",
        f"{result.latency_ratio:.2f}",
    )
