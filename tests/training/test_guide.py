"""The guide to schedules and distillation: its examples run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import torch

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")


def test_the_examples_run() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    names = {"__name__": "schedules"}
    for example in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(compile(example, "schedules.md", "exec"), names)
    assert names["schedule"].steps == 20 and set(names["parts"]) == {"kl"}  # type: ignore[attr-defined]
