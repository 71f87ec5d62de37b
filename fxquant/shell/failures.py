"""Errors in a line: what was raised, and where in whose code."""

from __future__ import annotations

import contextlib
import logging
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from fxquant.errors import FxquantError

_PACKAGE = str(Path(__file__).resolve().parents[1])
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", sysconfig.get_paths()["stdlib"])
_MOST = 300  # characters of a message


def first_line(error: BaseException) -> str:
    """``RuntimeError: the weights are not here``; of several lines the first, and those that a colon leads to."""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines))
    text = " ".join(lines[: last + 1])
    text = text if len(text) <= _MOST else f"{text[:_MOST]}…"
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def place(error: BaseException, *, ours: bool = False) -> str:
    """`` (models.py, line 12, in make)``: the innermost line of the user's code that was running, else of any package.

    Lines of fxquant count with ``ours`` alone; where there are no others it is empty. A file that does not parse is the
    place of its SyntaxError.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    theirs = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
    own = [frame for frame in theirs if not any(part in frame.filename for part in _INSTALLED)]
    found = own or theirs or (frames if ours else [])
    return f" ({found[-1].filename}, line {found[-1].lineno}, in {found[-1].name})" if found else ""


def written(error: FxquantError) -> str:
    """The message for a shell: what other libraries say in it has blank lines and their own lines of code."""
    lines = (line.rstrip() for line in str(error).splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("Exception from src/"))


@contextlib.contextmanager
def torch_is_quiet() -> Iterator[None]:
    """Inside, torch writes no tracebacks of its own for an error that is raised as well, unless TORCH_LOGS is set."""
    named = {} if os.environ.get("TORCH_LOGS") else logging.root.manager.loggerDict
    loggers = [one for name, one in named.items() if name.split(".")[0] == "torch" and isinstance(one, logging.Logger)]
    levels = [(handler, handler.level) for logger in loggers for handler in logger.handlers]
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
