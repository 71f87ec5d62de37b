"""A Trainer's and a Lightning training that are killed go on bit for bit; `killed.py` has twenty points for each."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.prepared.killed import STEPS, Kill, check_resumed, last_whole, losses, run

pytestmark = pytest.mark.slow


def installed(*packages: str) -> pytest.MarkDecorator:
    """Skips without them. Lightning is not imported into this process, whose torch.compile it would replace."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@installed("transformers", "accelerate")
def test_a_trainer(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("Trainer", whole)
    run("Trainer", killed, Kill(3))
    run("Trainer", killed, Kill(6, "optimizer.pt"))
    torn = killed / "run" / "checkpoint-6"
    sizes = [(each / "optimizer.pt").stat().st_size for each in (torn, whole / "run" / "checkpoint-6")]
    assert sizes[0] == sizes[1] // 2 and not (torn / "trainer_state.json").exists()
    assert run("Trainer", killed, latest=True) == 1, "docs/stacks.md: it takes the torn one, and stops with an error"
    assert last_whole(str(killed / "run")) == str(killed / "run" / "checkpoint-4")
    run("Trainer", killed)
    assert check_resumed(whole, killed) == 4 and len(losses(whole)) == STEPS


@installed("lightning")
def test_lightning(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("Lightning", whole)
    run("Lightning", killed, Kill(3))
    run("Lightning", killed, Kill(6, "last.ckpt"))
    assert next(path.stat().st_size for path in killed.glob("tmp*")) > 1000, "half of it was written elsewhere"
    run("Lightning", killed)
    assert check_resumed(whole, killed) == 4 and len(losses(whole)) == STEPS
