"""A parser that keeps what was added to it, and what an argument may be: `fxquant.shell.completion` reads both."""

from __future__ import annotations

import argparse
from typing import Any

FILE = "file"
TARGET = "target"
RECIPE = "recipe"


class Parser(argparse.ArgumentParser):
    """argparse's, with its arguments in ``arguments`` and the parsers of its commands in ``commands``, by name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.arguments: list[argparse.Action] = []
        self.commands: dict[str, Parser] = {}
        super().__init__(*args, **options)  # which adds --help

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        """As argparse's."""
        action = super().add_argument(*args, **options)
        self.arguments.append(action)
        return action

    def add_command(self, added: Any, name: str, help: str, **options: Any) -> Parser:
        """A command; ``added`` is what ``add_subparsers`` gave. Its help is what it describes itself by, too."""
        found: Parser = added.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **options)
        self.commands[name] = found
        return found


def completed(action: argparse.Action, by: str) -> None:
    """Says that the values of an argument are files, targets' names or recipes' names."""
    action.completed_by = by  # type: ignore[attr-defined]


def completed_by(action: argparse.Action) -> str | None:
    """`FILE`, `TARGET`, `RECIPE`, or None where nothing was said."""
    return getattr(action, "completed_by", None)
