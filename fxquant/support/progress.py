"""A progress bar where someone can see it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yields the items; draws a bar on a terminal, with rich if it is installed, else as a plain counter."""
    if not show or not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        yield from _plain(items, description)
        return
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    yield from rich_track(items, description=description, total=total, console=Console(stderr=True))


def _plain(items: Iterable[T], description: str) -> Iterator[T]:
    count = 0
    for count, item in enumerate(items, start=1):
        yield item
        sys.stderr.write(f"\r{description} {count}")
    if count:
        sys.stderr.write("\n")
