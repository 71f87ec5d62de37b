"""``fxquant doctor``: what is installed and works on this machine, a line each, with the fix where something is not.

    before                                    after
    an environment of which nothing is known  a line for each part, exit status 0 where training works

It changes nothing but compilers' caches, and it never ends in a traceback.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator
from typing import TextIO

import fxquant
from fxquant.shell.doctor import machine, packages, training
from fxquant.shell.doctor.checks import BROKEN, MISSING, Check, Finding, found_by

__all__ = ["Finding", "checks", "examine", "line"]


def checks(*, quick: bool) -> Iterator[Check]:
    """All that is asked, in order; ``quick`` leaves out what compiles."""
    return itertools.chain(machine.checks(quick=quick), packages.checks(quick=quick), training.checks(quick=quick))


def examine(out: TextIO, *, quick: bool = False, as_json: bool = False) -> int:
    """Asks and prints, each line as it is known; with ``as_json`` one object at the end.

    Returns the exit status: 0 where nothing is broken, and unless ``quick`` a step was trained; else 1.
    """
    where = {"fxquant": fxquant.__version__, "platform": platform.platform()}
    if not as_json:
        out.write(f"fxquant {where['fxquant']} on {where['platform']}\n")
    findings = []
    for check in checks(quick=quick):
        findings.append(found_by(check))
        if not as_json:
            out.write(f"{line(findings[-1])}\n")
            out.flush()
    broken = [each.name for each in findings if each.status == BROKEN]
    if as_json:
        plain = {"ok": not broken, **where, "findings": [each.to_dict() for each in findings]}
        out.write(f"{json.dumps(plain, indent=2)}\n")
    else:
        out.write(f"{_verdict(findings, broken, quick)}\n")
    return 1 if broken else 0


def line(found: Finding) -> str:
    """``name  status  what was found → how to mend it``."""
    fix = f" → {found.fix}" if found.fix else ""
    return f"{found.name:<12} {found.status:<8}  {found.found}{fix}"


def _verdict(findings: list[Finding], broken: list[str], quick: bool) -> str:
    if broken:
        return f"broken: {', '.join(broken)}"
    missing = sum(each.status == MISSING for each in findings)
    works = "Nothing that is installed is broken, as far as --quick looks." if quick else "Training works here."
    return f"{works} {missing} optional {'part is' if missing == 1 else 'parts are'} missing." if missing else works
