"""The name that the shell was called by."""

from __future__ import annotations

import sys
from pathlib import Path


def called_as() -> str:
    """``fxquant`` from the installed script, else ``python -m fxquant``."""
    return "fxquant" if Path(sys.argv[0]).stem in ("fxquant", "fxquant-script") else "python -m fxquant"
