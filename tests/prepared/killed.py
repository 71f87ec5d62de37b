"""Trainings of transformers' Trainer and of Lightning that die where they are told, and go on.

`python -m tests.prepared.killed` kills each at twenty points, each in a training of its own, and prints what the runs
that went on from there were like; `test_killed_stacks.py` has a few of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fxquant
from fxquant.prepared.quantizer import quantizers
from tests.quick import compiles_are_quick

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.prepared.killed", "transformers", "lightning"])  # imported once for all
STEPS, EVERY, ROWS = 8, 2, 4
STACKS = (Path(__file__).parents[2] / "docs" / "stacks.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kill:
    """Where a process dies: after a step's loss, or with so much of a file of its checkpoint written."""

    step: int
    file: str = ""
    share: float = 0.5

    def __str__(self) -> str:
        return f"step {self.step}" + (f", {self.share:.0%} of {self.file}" if self.file else "")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Rows(Dataset):
    """Numbers, each row others."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        return {"x": torch.randn(2, 6, 6, generator=draw) * (1 + index / 8), "labels": torch.tensor(index % 4)}


class Classifier(nn.Module):
    """Convolution, BatchNorm, dropout, which draws random numbers, and a head; writes each loss as it comes."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.net = nn.Sequential(body, nn.Flatten(), nn.Linear(64, 4))
        fxquant.prepare(self.net, (torch.randn(2, 2, 6, 6),))
        self.net.compile(backend="fxquant_eager", dynamic=False)
        self.folder, self.kill, self.step = folder, kill, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, labels)
        with (self.folder / "losses").open("a") as file:
            file.write(f"{self.step} {loss.item().hex()}\n")
        if self.kill == Kill(self.step):
            die()
        self.step += 1
        return {"loss": loss, "logits": logits}


def partly(write: Callable[[Path, bytes], None], whole: Callable[[], bytes], path: Any, kill: Kill) -> None:
    """Writes what there is before the process dies."""
    data = whole()
    write(Path(path), data[: int(len(data) * kill.share)])
    die()


def saved_by(path: str, save: Callable[[Any], None]) -> bytes:
    """The bytes that it would write."""
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/{Path(path).name}")
        return Path(folder, Path(path).name).read_bytes()


# ---------------------------------------------------------------- transformers' Trainer


def last_whole(folder: str) -> str | None:
    """As docs/stacks.md gives it."""
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?def last_whole.*?)```", STACKS, re.DOTALL)[0], found)
    return found["last_whole"](folder)


def by_trainer(folder: Path, kill: Kill | None, latest: bool = False) -> nn.Module:
    """The model at the end of a Trainer's run; its checkpoint is a folder of files, which are written one by one.

    ``latest`` leaves to the Trainer which checkpoint to go on from.
    """
    import safetensors.torch
    from transformers import Trainer, TrainerState, TrainingArguments

    arguments = TrainingArguments(
        str(folder / "run"), max_steps=STEPS, learning_rate=5e-2, per_device_train_batch_size=ROWS, use_cpu=True,
        save_steps=EVERY, full_determinism=True, report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = Classifier(folder, kill)
    trainer = Trainer(model, arguments, train_dataset=Rows())
    here = last_whole(arguments.output_dir)
    if here is not None:
        model.step = int(here.rpartition("-")[2])
    save, save_file, save_state = torch.save, safetensors.torch.save_file, TrainerState.save_to_json

    def is_the_one(path: Any) -> bool:
        return kill is not None and str(path).endswith(f"checkpoint-{kill.step}/{kill.file}")

    def to(path: Any, write: Callable[[Any], None]) -> None:
        if is_the_one(path):
            partly(Path.write_bytes, lambda: saved_by(path, write), path, kill)
        write(path)

    with (
        patch("torch.save", lambda state, path: to(path, lambda where: save(state, where))),
        patch(
            "safetensors.torch.save_file",
            lambda state, path, **more: to(path, lambda where: save_file(state, where, **more)),
        ),
        patch.object(TrainerState, "save_to_json", lambda self, path: to(path, lambda where: save_state(self, where))),
    ):
        trainer.train(resume_from_checkpoint=latest or here)
    return model


# ---------------------------------------------------------------- Lightning


def by_lightning(folder: Path, kill: Kill | None, latest: bool = False) -> nn.Module:
    """The model at the end of a Lightning run; its checkpoint is a file, which takes its place when it is whole."""
    import lightning
    from fsspec.implementations.local import LocalFileOpener
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier(folder, kill)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 5e-2, momentum=0.9)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["random"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.model.step = checkpoint["global_step"]
            torch.set_rng_state(checkpoint["random"])

    write = LocalFileOpener.write

    def written(self: LocalFileOpener, data: bytes) -> int:
        if kill is not None and kill.step == module.global_step and kill.file == Path(self.path).name:
            write(self, data[: int(len(data) * kill.share)])
            self.flush()
            die()
        return write(self, data)

    warnings.filterwarnings("ignore", module="lightning")
    module = Module()
    callback = ModelCheckpoint(folder / "run", filename="{step}", save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=STEPS // EVERY, callbacks=[callback], logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=EVERY,
    )  # fmt: skip
    last = folder / "run" / "last.ckpt"
    with patch.object(LocalFileOpener, "write", written):
        trainer.fit(module, DataLoader(Rows(), ROWS, shuffle=True), ckpt_path=last if last.exists() else None)
    return module.model


WAYS: dict[str, Callable[..., nn.Module]] = {"Trainer": by_trainer, "Lightning": by_lightning}
FILES = {
    "Trainer": ("model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                "trainer_state.json"),
    "Lightning": ("step={}.ckpt", "last.ckpt"),
}  # fmt: skip


# ---------------------------------------------------------------- all of them


def train(way: str, folder: Path, kill: Kill | None, latest: bool) -> None:
    """Trains from the last checkpoint on, and writes everything at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    tempfile.tempdir = str(folder)  # where Lightning's new file is, until it takes its place
    with compiles_are_quick():
        model = WAYS[way](folder, kill, latest)
    torch.save({**model.state_dict(), "random": torch.get_rng_state()}, folder / "end.pt")
    (folder / "end.json").write_text(json.dumps([q.observing for _, q in quantizers(model.net)]))


def run(way: str, folder: Path, kill: Kill | None = None, latest: bool = False) -> int | None:
    """A process that trains, and dies where ``kill`` says; gives its exit code."""
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=train, args=(way, folder, kill, latest))
    process.start()
    process.join()
    if not latest:
        assert process.exitcode == (0 if kill is None else -signal.SIGKILL), f"{way}, {kill}: {process.exitcode}"
    return process.exitcode


def losses(folder: Path) -> list[tuple[int, str]]:
    """What was written, in the order of time."""
    lines = (folder / "losses").read_text().splitlines()
    return [(int(step), loss) for step, loss in map(str.split, lines)]


def check_resumed(whole: Path, folder: Path) -> int:
    """How many steps were done again: each loss, whenever it came, and all that is left are the whole run's."""
    expected, seen = losses(whole), losses(folder)
    assert [step for step, _ in expected] == list(range(STEPS))
    assert set(seen) == set(expected), f"a step that was done again gave another loss: {set(seen) ^ set(expected)}"
    assert (folder / "end.json").read_text() == (whole / "end.json").read_text()
    ends = [torch.load(each / "end.pt", weights_only=True) for each in (whole, folder)]
    assert ends[0].keys() == ends[1].keys()
    differ = [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])]
    assert not differ, f"not bit-identical: {differ}"
    return len(seen) - len(expected)


def points(way: str) -> list[Kill]:
    """Twenty: after each step, and in files of checkpoints, at their start, in the middle, and when they are whole."""
    found = [Kill(step) for step in range(STEPS)]
    for number in range(20 - STEPS):
        step = EVERY * (1 + number % (STEPS // EVERY - 1))  # at the last one nothing is left to be done
        file = FILES[way][number % len(FILES[way])].format(step)
        found.append(Kill(step, file, (0.0, 0.5, 1.0)[number // 4 % 3]))
    return found


def main() -> None:
    """Prints, for each point, what the run that went on was like, and what a Trainer by itself makes of a torn file."""
    with tempfile.TemporaryDirectory() as temporary:
        for way in sys.argv[1:] or WAYS:
            whole = Path(temporary, way)
            run(way, whole)
            for number, kill in enumerate(points(way)):
                folder = Path(temporary, f"{way}-{number}")
                run(way, folder, kill)
                itself = ""
                if kill.file and way == "Trainer":
                    tried = Path(temporary, f"{way}-{number}-itself")
                    shutil.copytree(folder, tried)
                    itself = "goes on" if run(way, tried, latest=True) == 0 else "stops with an error"
                run(way, folder)
                again = check_resumed(whole, folder)
                print(f"{way}, {kill}: bit-identical, {again} steps again. {itself}", flush=True)


if __name__ == "__main__":
    main()
