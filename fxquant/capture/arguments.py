"""What users give as example inputs."""

from __future__ import annotations

from typing import Any

from fxquant.errors import InvalidArgument


def check_args(args: Any) -> None:
    """Raises InvalidArgument for example inputs that are no tuple: a tensor alone would be taken apart by rows."""
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"args must be a tuple of example inputs: got {type(args).__name__}. Write (x,) for a single input."
        )
