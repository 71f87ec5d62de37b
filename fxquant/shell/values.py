"""What an argument of the command line may be: said where it is added, read by `fxquant.shell.completion`."""

from __future__ import annotations

import argparse

FILE = "file"
TARGET = "target"
RECIPE = "recipe"


def completed(action: argparse.Action, by: str) -> None:
    """Says that the values of an argument are files, targets' names or recipes' names."""
    action.completed_by = by  # type: ignore[attr-defined]


def completed_by(action: argparse.Action) -> str | None:
    """`FILE`, `TARGET`, `RECIPE`, or None where nothing was said."""
    return getattr(action, "completed_by", None)
