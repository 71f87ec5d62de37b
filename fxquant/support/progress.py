"""A progress bar where someone can see it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_QUIET = 2  # seconds


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


@contextlib.contextmanager
def counting(description: str, *, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Inside, a function that says what is being done, for work whose steps are not known before.

    It draws a line on a terminal, from two seconds on.
    """
    start, drawn = time.monotonic(), False

    def step(text: str) -> None:
        nonlocal drawn
        passed = time.monotonic() - start
        if show and passed > _QUIET and sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{description}, {passed:.0f} s: {text}")
            sys.stderr.flush()
            drawn = True

    try:
        yield step
    finally:
        if drawn:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextlib.contextmanager
def waiting(doing: str, *, show: bool = True) -> Iterator[None]:
    """Inside, work of one step: a terminal reads what it is, from two seconds on, until it is done."""
    if not show or not sys.stderr.isatty():
        yield
        return
    drawn = threading.Event()

    def draw() -> None:
        drawn.set()
        sys.stderr.write(f"\r\033[K{doing} …")
        sys.stderr.flush()

    timer = threading.Timer(_QUIET, draw)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if drawn.is_set():
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
