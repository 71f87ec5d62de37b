"""Code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.house.sources import ROOT


def under_another_hash_seed(code: str, *arguments: str) -> str:
    """What it prints where sets have another order than here: one process and this one show what two would."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env={"PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
