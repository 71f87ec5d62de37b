"""Errors in a line: what was raised, and where in whose code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1])
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", sysconfig.get_paths()["stdlib"])
_MOST = 300  # characters of a message


def first_line(error: BaseException) -> str:
    """``RuntimeError: the weights are not here``; of several lines the first, and those that a colon leads to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines))
    text = " ".join(lines[: last + 1])
    text = text if len(text) <= _MOST else f"{text[:_MOST]}…"
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def place(error: BaseException) -> str:
    """``models.py, line 12, in make``: the innermost line of the user's code that was running, else of any.

    A file that does not parse is the place of its SyntaxError.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    theirs = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
    own = [frame for frame in theirs if not any(part in frame.filename for part in _INSTALLED)]
    for found in (own, theirs, frames):
        if found:
            return f"{found[-1].filename}, line {found[-1].lineno}, in {found[-1].name}"
    return "no place is known"
