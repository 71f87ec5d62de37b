"""examples/getting_started.ipynb: docs/getting-started.md as a notebook, its outputs those that the page shows.

python -m tests.house.notebook    writes it
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "getting-started.md"
NOTEBOOK = ROOT / "examples" / "getting_started.ipynb"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```\n(?P<shown>.*?)```\n)?", re.DOTALL)


def prose(text: str) -> str:
    """Links as they are from the notebook's folder."""
    return re.sub(r"\]\((?=[\w-]+\.md)", "](../docs/", text).strip()


def cell(number: int, kind: str, source: str, **more: Any) -> dict[str, Any]:
    return {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": source.rstrip("\n").splitlines(keepends=True),
        **more,
    }


def cells(guide: str) -> list[dict[str, Any]]:
    """Prose and code by turns; what is shown below a block is its output."""
    made: list[dict[str, Any]] = []
    at = 0
    for block in BLOCK.finditer(guide):
        if text := prose(guide[at : block.start()]):
            made.append(cell(len(made), "markdown", text))
        at = block.end()
        shown = (block["shown"] or "").splitlines(keepends=True)
        outputs = [{"name": "stdout", "output_type": "stream", "text": shown}] if shown else []
        made.append(cell(len(made), "code", block["code"], execution_count=None, outputs=outputs))
    return [*made, cell(len(made), "markdown", prose(guide[at:]))]


def notebook(guide: str) -> str:
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    held = {"cells": cells(guide), "metadata": python, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(held, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
