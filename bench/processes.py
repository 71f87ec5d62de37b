"""A bench's command line run in several fresh processes: medians of what they measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, object]

MEASURED = ("step_seconds", "step_ratio", "share")
NAMES = ("net", "dtype", "variant", "half", "what")


def run_again(processes: int, arguments: Sequence[str]) -> tuple[list[Row], int]:
    """Rows of ``arguments`` of this program, medians over ``processes`` runs one after another; the worst status."""
    runs: list[list[Row]] = []
    status = 0
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.jsonl"
            out.touch()
            command = [sys.executable, sys.argv[0], *arguments, "--processes", "1", "--out", str(out)]
            status = max(status, abs(subprocess.run(command, check=False).returncode))
            runs.append([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])
    return medians(runs), status


def medians(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """A row for each that all runs have: medians of `MEASURED`, all else as in the first, and how many ``processes``.

    A ratio is the median of the processes' own, since one process is slower than another as a whole.
    """
    named = [{tuple(row.get(name) for name in NAMES): row for row in run} for run in runs]
    return [
        {**row, **_middle([each[key] for each in named]), "processes": len(runs)}
        for key, row in named[0].items()
        if all(key in each for each in named)
    ]


def _middle(rows: Sequence[Row]) -> Row:
    """Medians of what rows measured."""
    values = {name: [row[name] for row in rows] for name in MEASURED if name in rows[0]}
    return {name: statistics.median(found) for name, found in values.items()}  # type: ignore[type-var]
