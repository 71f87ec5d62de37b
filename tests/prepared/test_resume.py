"""A training that is killed at any point goes on from its last checkpoint, bit for bit as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

import fxquant
from fxquant.prepared.quantizer import quantizers

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # imports torch once for all of them
STEPS, EVERY, FREEZE = 9, 3, 4


def net() -> nn.Module:
    """Convolution, BatchNorm, dropout, which draws random numbers, and a head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(64, 4))


class Power:
    """Its file takes so many bytes; then the process is killed, as by ``kill -9``."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        """What fits, so that the file is left half-written."""
        written = self.file.write(bytes(data)[: self.left])
        self.left -= written
        if self.left <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def flush(self) -> None:
        self.file.flush()


def saved(folder: Path, state: dict[str, Any], size: int | None) -> None:
    """As users do it: to another name, moved into place when it is whole; killed after ``size`` bytes, if given."""
    with (folder / "new.pt").open("wb") as file:
        torch.save(state, file if size is None else Power(file, size))
    os.replace(folder / "new.pt", folder / "last.pt")


def train(folder: Path, kill: tuple[int, int | None] | None = None) -> None:
    """Trains from the last checkpoint in the folder on; writes each loss as it comes and, at the end, everything.

    ``kill`` names the step after whose loss the process dies, at once or so many bytes into its checkpoint.
    """
    torch.set_num_threads(1)
    model = fxquant.prepare(net(), (torch.randn(2, 2, 6, 6),))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    compiled, first = torch.compile(model, backend="fxquant_eager"), 0
    torch.manual_seed(1)
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        first = state["step"]
    for step in range(first, STEPS):
        if step == FREEZE:
            fxquant.freeze_ranges(model)
            fxquant.freeze_batch_norm(model)
        optimizer.zero_grad()
        loss = compiled(torch.randn(4, 2, 6, 6) * (1 + step)).square().mean()
        loss.backward()
        optimizer.step()
        with (folder / "losses").open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")
        if kill == (step, None):
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["random"] = torch.get_rng_state()
            saved(folder, state, kill[1] if kill is not None and kill[0] == step else None)
    end = {"observing": [q.observing for _, q in quantizers(model)], "normalizing": model[0][1].training}
    torch.save({**model.state_dict(), "random": torch.get_rng_state()}, folder / "end.pt")
    (folder / "end.json").write_text(json.dumps(end))


def losses(folder: Path) -> list[tuple[int, str]]:
    """What was written, in the order of time."""
    lines = (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else []
    return [(int(step), loss) for step, loss in map(str.split, lines)]


def run(folder: Path, kill: tuple[int, int | None] | None = None) -> None:
    """A process that trains, and dies where ``kill`` says."""
    process = PROCESSES.Process(target=train, args=(folder, kill))
    process.start()
    process.join()
    assert process.exitcode == (0 if kill is None else -signal.SIGKILL)


def check_resumed(whole: Path, folder: Path) -> None:
    """Each loss, whenever it came, and all that is left are those of the run that was not killed."""
    expected, seen = losses(whole), losses(folder)
    assert len(seen) >= len(expected) == STEPS
    assert set(seen) == set(expected), "a step that was done again gave another loss"
    assert (folder / "end.json").read_text() == (whole / "end.json").read_text()
    ends = [torch.load(each / "end.pt", weights_only=True) for each in (whole, folder)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run(whole)
    for kill in ((5, 2000), (7, None), None):  # into the second checkpoint; between the second and the third
        run(killed, kill)
        assert (killed / "new.pt").exists() == (kill == (5, 2000)), "a half-written checkpoint was left, and gone over"
    assert json.loads((whole / "end.json").read_text()) == {"observing": [False] * 4, "normalizing": False}
    assert len(losses(killed)) > STEPS, "steps after the last checkpoint were done again"
    check_resumed(whole, killed)
