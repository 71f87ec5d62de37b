"""``fxquant`` and ``python -m fxquant``: what a shell can do with a model or a file.

Exit status 0 is good, 1 is not, 2 is usage, 130 an interrupt. Errors are a line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable

import fxquant
from fxquant.errors import FxquantError
from fxquant.shell.called_as import called_as
from fxquant.shell.failures import written
from fxquant.shell.parser import parser


def main(argv: list[str] | None = None) -> int:
    """Dispatches to a command; returns its exit status."""
    commands = parser(fxquant.__version__)
    known, rest = commands.parse_known_args(argv)
    if known.command == "demo":
        from fxquant.shell.demo import main as demo

        return demo(rest, prog=f"{called_as()} demo")
    if rest:
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    known.out = sys.stdout
    aside = sys.stderr if getattr(known, "json", False) else sys.stdout  # a model that prints is no part of the JSON
    with contextlib.redirect_stdout(aside):
        return known.run(known) if known.traceback else _run(known.run, known)


def _run(command: Callable[[argparse.Namespace], int], given: argparse.Namespace) -> int:
    """What the command returns; 1, with a line on stderr, where what it was given is no good.

    Other errors are bugs of fxquant or torch and come through whole.
    """
    try:
        status = command(given)
        given.out.flush()
        return status
    except FxquantError as error:
        sys.stderr.write(f"{written(error)}\n")
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), given.out.fileno())
    except OSError as error:
        what = error.filename if error.filename is not None else given.command
        sys.stderr.write(f"{what} must be readable and writable: got {error.strerror or error}.\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"{called_as()} {given.command}: interrupted\n")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
