"""A progress bar where someone can see it."""

from __future__ import annotations

import contextlib
import contextvars
import shutil
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

    A terminal reads it in one line, from two seconds on and anew each second, until it is done; of two that are nested,
    the outer's.
    """
    if not show or _is_drawn.get() or not sys.stderr.isatty():
        yield lambda text: None
        return
    line = _Line(description)
    thread = threading.Thread(target=line.draw_each_second, name="fxquant-progress", daemon=True)
    thread.start()
    token = _is_drawn.set(True)
    try:
        yield line.say
    finally:
        _is_drawn.reset(token)
        line.over.set()
        thread.join()
        line.clear()


_is_drawn: contextvars.ContextVar[bool] = contextvars.ContextVar("is_drawn", default=False)


class _Line:
    """What is being done, in the last line of a terminal."""

    def __init__(self, description: str) -> None:
        self.description, self.text, self.drawn = description, "", False
        self.start, self.over, self.stream = time.monotonic(), threading.Event(), sys.stderr

    def say(self, text: str) -> None:
        self.text = text

    def draw_each_second(self) -> None:
        wait = float(_QUIET)
        while not self.over.wait(wait):
            passed = f"{self.description}, {time.monotonic() - self.start:.0f} s"
            line = f"{passed}: {self.text}" if self.text else passed
            width = shutil.get_terminal_size().columns - 1  # what wraps into a second line stays there
            self.stream.write(f"\r\033[K{line[:width]}")
            self.stream.flush()
            self.drawn, wait = True, 1.0

    def clear(self) -> None:
        if self.drawn:
            self.stream.write("\r\033[K")
            self.stream.flush()
