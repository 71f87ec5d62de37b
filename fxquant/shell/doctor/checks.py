"""One question to the machine, and its answer as a line; a question that fails is an answer too."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fxquant.shell.failures import first_line, place
from fxquant.support.progress import counting

OK, NOTE, MISSING, LEFT_OUT, BROKEN = "ok", "note", "missing", "left out", "broken"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found.

    Attributes:
        status: ``"ok"``; ``"note"``, which works, with a word on it; ``"missing"``, which is optional; ``"left out"``,
            which was not tried, with the reason; ``"broken"``, which alone makes the exit status 1.
        found: versions, what ran, or what went wrong.
        fix: how to get it, or to mend it; empty where there is nothing to do.
    """

    status: str
    found: str
    fix: str = ""
    name: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name, "status": self.status, "found": self.found, "fix": self.fix,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question by its name.

    Attributes:
        doing: said on a terminal while it takes long.
        ask: finds the answer, or raises.
        needs: packages without which it is left out.
        mend: the fix where it raises.
    """

    name: str
    doing: str
    ask: Callable[[], Finding]
    mend: str = ""
    needs: tuple[str, ...] = ()


def found_by(check: Check) -> Finding:
    """The answer, whatever happens: no exception comes out but an interrupt, nothing is printed by what is asked."""
    start = time.perf_counter()
    try:
        with counting(check.doing), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lacking = [each for each in check.needs if not is_there(each)]
            found = Finding(status=LEFT_OUT, found=f"without {' and '.join(lacking)}") if lacking else check.ask()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may end the process as it is imported
        found = Finding(status=BROKEN, found=f"{first_line(error)}{place(error, ours=True)}", fix=check.mend)
    return replace(found, name=check.name, seconds=time.perf_counter() - start)


def in_range(version: str, oldest: str, newest: str, install: str) -> Finding | None:
    """What is to be said of a version, by major and minor; None within the range. An empty bound is none."""
    if oldest and _numbers(version) < _numbers(oldest):
        return Finding(status=BROKEN, found=f"{version} is older than {oldest}", fix=install)
    if newest and _numbers(version) > _numbers(newest):
        return Finding(status=NOTE, found=f"{version} is newer than {newest}, the newest that was tried")
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def is_there(module: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def pip(*what: str) -> str:
    """The command that installs."""
    return "pip install " + " ".join(f'"{each}"' for each in what)
