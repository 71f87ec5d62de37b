"""transformers' Trainer and Lightning step a schedule by its callback, and take a run up bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"Trainer": ("transformers", "accelerate"), "Lightning": ("lightning",)}
WAYS = [way for way, names in PACKAGES.items() if all(importlib.util.find_spec(name) for name in names)]


@pytest.mark.slow
@pytest.mark.skipif(not WAYS, reason="needs transformers and accelerate, or lightning")
def test_trainers_step_a_schedule_and_take_it_up(tmp_path: Path) -> None:
    """In a process of its own: Lightning is not imported into this one, whose torch.compile it would replace."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = forked.run(["-m", "tests.quick", "tests/training/stacks.py", str(tmp_path), *WAYS], env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"steps"')]
    assert len(found) == len(WAYS)
    for each in found:
        assert each["steps"] == [6, 6] and not each["differ"], each
        assert len(each["losses"]) == 6 and each["losses"][3:] == each["resumed"]
        assert each["losses"][:5] == each["undamped"][:5] and each["losses"][5] != each["undamped"][5]
        assert each["batches"] == 1, "BatchNorm was re-estimated as the last stage began"
        assert each["stage"] == "step 6, stage 4 of 4: BatchNorm re-estimated"
