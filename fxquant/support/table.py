"""Plain-text tables: aligned columns, no dependency."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns under a ruled header; numbers are the caller's to format."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def megabytes(count: float) -> str:
    """``1.25 MB``, ``12.3 kB``."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def short(source: str) -> str:
    """The file's name and line, without its folders."""
    return source.replace("\\", "/").rsplit("/", 1)[-1]
