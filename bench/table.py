"""JSON lines as a table: by rich where it is installed, in plain text otherwise.

python bench/table.py build/bench.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from machine import environment

Row = Mapping[str, object]


def grouped(rows: Sequence[Row]) -> list[tuple[list[str], list[Row]]]:
    """Rows with the same keys are one table: its columns, the machine's left out, and its rows in order."""
    machine = set(environment())
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(key for key in row if key not in machine), []).append(row)
    return [(list(columns), found) for columns, found in tables.items()]


def cell(value: object) -> str:
    """Short text of a value: thousands set apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", " ")
    return str(value)


def plain(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns as wide as their longest cell; numbers to the right."""
    cells = [list(columns), *([cell(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [all(not isinstance(row[name], str) for row in rows) for name in columns]
    lines = (
        "  ".join(
            text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def show(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    for columns, found in grouped(rows):
        if importlib.util.find_spec("rich") is None:
            print(plain(columns, found), end="\n\n")
            continue
        from rich.console import Console
        from rich.table import Table

        width = max(len(line) for line in plain(columns, found).splitlines()) + 2  # rich pads both ends
        table = Table(box=None, header_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if isinstance(found[0][name], str) else "right", no_wrap=True)
        for row in found:
            table.add_row(*(cell(row[name]) for name in columns))
        console = Console()
        console.width = max(console.width, width)  # a long line is better than cut numbers
        console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    lines = parser.parse_args().file.read_text(encoding="utf-8").splitlines()
    show([json.loads(line) for line in lines])


if __name__ == "__main__":
    main()
