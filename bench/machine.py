"""What a bench row says of where and when it was measured."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch


def cpu() -> str:
    """Model name, and whether it multiplies 8-bit integers in hardware: matrices of them (AMX), or vectors (VNNI)."""
    from fxquant.targets.cpu import integer_dot_support, integer_matrices

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line), name)
    return f"{name}, {'no VNNI' if integer_dot_support() else 'AMX' if integer_matrices() else 'VNNI'}"


def environment() -> dict[str, object]:
    """Versions, date and machine, the same keys in every row."""
    return {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
    }


def emit(rows: Iterable[Mapping[str, object]], out: Path | None) -> None:
    """Prints a JSON line per row, and appends it to ``out``."""
    for row in rows:
        line = json.dumps(row)
        print(line, flush=True)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
