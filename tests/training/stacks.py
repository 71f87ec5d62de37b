"""Trainings in stages by transformers' Trainer and by Lightning, whole and taken up: run in a process of its own.

`python -m tests.training.stacks FOLDER` prints what they were like, a line of JSON for each.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxquant
from fxquant import Stage

STEPS, HALF, ROWS = 6, 3, 4
X = torch.randn(STEPS * ROWS, 2, 6, 6, generator=torch.Generator().manual_seed(0))
STAGES = (
    Stage(at=0, weights="float", activations="observe"),
    Stage(at=2, weights=8, activations="quantize"),
    Stage(at=4, weights="quantize", damping=0.5, freeze_ranges=True),
    Stage(at=1.0, batch_norm_data=[X[:ROWS]]),
)


class Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "labels": torch.tensor(index % 4)}


class Classifier(nn.Module):
    """A net that is prepared and compiled in place, with its schedule; writes each loss down."""

    def __init__(self, damped: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        fxquant.prepare(self.net, (X[:2],), recipe="w4a8")
        self.net.compile(backend="fxquant_eager", dynamic=False)
        stages = STAGES if damped else tuple(Stage(**{**vars(each), "damping": 0.0}) for each in STAGES)
        self.__dict__["schedule"] = fxquant.Schedule(self.net, stages, total_steps=STEPS)
        self.losses: list[float] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


def by_trainer(folder: Path, steps: int, resume: bool, damped: bool = True) -> Classifier:
    from transformers import Trainer, TrainingArguments

    model = Classifier(damped)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=5e-2, per_device_train_batch_size=ROWS, use_cpu=True, report_to=[],
        save_steps=HALF, disable_tqdm=True, optim="sgd", lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[model.schedule.trainer_callback()])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return model


def by_lightning(folder: Path, steps: int, resume: bool, damped: bool = True) -> Classifier:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier(damped)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 5e-2)

    module = Module()
    callback, checkpoints = (
        module.model.schedule.lightning_callback(),
        ModelCheckpoint(folder, filename="{step}", save_top_k=-1),
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=steps // HALF, callbacks=[callback, checkpoints],
        logger=False, enable_progress_bar=False, enable_model_summary=False, limit_train_batches=HALF,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(), ROWS), ckpt_path=folder / f"step={HALF}.ckpt" if resume else None)
    return module.model


def told(way: Any, folder: Path) -> dict[str, Any]:
    """A whole run, one taken up in its middle, and one without damping."""
    whole, resumed = way(folder, STEPS, False), way(folder, STEPS, True)
    undamped = way(folder / "undamped", STEPS, False, damped=False)
    states = [each.net.state_dict() for each in (whole, resumed)]
    return {
        "steps": [whole.schedule.steps, resumed.schedule.steps],
        "losses": whole.losses,
        "resumed": resumed.losses,
        "differ": [key for key, value in states[0].items() if not torch.equal(value, states[1][key])],
        "undamped": undamped.losses,
        "batches": int(states[0]["1.num_batches_tracked"]),
        "stage": fxquant.explain(whole.net).stage,
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in sys.argv[2:]:  # Lightning last: its import replaces torch.compile
        print(json.dumps(told({"Trainer": by_trainer, "Lightning": by_lightning}[name], Path(sys.argv[1], name))))


if __name__ == "__main__":
    main()
