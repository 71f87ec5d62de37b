"""Whether stages help a 4-bit training: the digits, a small CNN with BatchNorm, w4a4, the same float start and steps.

    python bench/bench_schedules.py [--seeds 3] [--steps 210] [--only NAME,…] [--out …]

A JSON line per variant, then a table: mean and deviation, over seeds, of accuracy in percent and cross entropy on
450 digits that were not trained on, in eval mode as deployed. The seed draws the float weights and the order of the
batches; each variant trains on the same. ``float`` is the float model trained as many steps more.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import emit, environment
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxquant
from fxquant import Stage
from fxquant.support.table import table

BATCH, START, RATE = 64, 420, 2e-3
Q = {"weights": "quantize", "activations": "quantize"}


def digits() -> tuple[Tensor, Tensor]:
    """Images and labels, in an order of their own."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(found.target)[order]


X, Y = digits()
TRAIN = 1347
DATA = [X[i : i + BATCH] for i in range(0, TRAIN - BATCH, BATCH)]
VARIANTS: dict[str, list[Stage] | None] = {
    "float": None,
    "no stages": [],
    "float 20 %, observed 10 %": [
        Stage(at=0, weights="float", activations="float"),
        Stage(at=0.2, activations="observe"),
        Stage(at=0.3, **Q),
    ],
    "activations after 30 %": [Stage(at=0, activations="observe"), Stage(at=0.3, activations="quantize")],
    "weights 8, 6, 4 bits": [Stage(at=0, weights=8), Stage(at=0.2, weights=6), Stage(at=0.4, weights="quantize")],
    "all 8, 6, 4 bits": [
        Stage(at=0, weights=8, activations=8),
        Stage(at=0.2, weights=6, activations=6),
        Stage(at=0.4, **Q),
    ],
    "BatchNorm frozen after 70 %": [Stage(at=0.7, freeze_batch_norm=True)],
    "BatchNorm re-estimated": [Stage(at=1.0, batch_norm_data=DATA)],
    "damping 0.01 after 50 %": [Stage(at=0.5, damping=0.01)],
    "damping 0.1 after 50 %": [Stage(at=0.5, damping=0.1)],
    "damping 0.01, re-estimated": [Stage(at=0.5, damping=0.01), Stage(at=1.0, batch_norm_data=DATA)],
}


def net(width: int = 4) -> nn.Module:
    """Three convolutions and a head; 4 channels, so that 4 bits cost something."""
    sizes = [(1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)]
    blocks = [nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in sizes]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def batches(seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches of the training digits, an order for each pass."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(TRAIN, generator=draw)
        for rows in order.split(BATCH)[: TRAIN // BATCH]:
            if steps == 0:
                return
            steps -= 1
            yield X[rows], Y[rows]


def start(seed: int) -> nn.Module:
    """The float model that every variant starts from."""
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for x, y in batches(seed, START):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def trained(model: nn.Module, stages: list[Stage] | None, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy and cross entropy after so many steps more, by the stages; None trains the float model."""
    run, schedule = model, None
    if stages is not None:
        torch._dynamo.reset()
        fxquant.prepare(model, (X[:2],), recipe="w4a4")
        fxquant.calibrate(model, [X[:256]], progress=False)
        schedule = fxquant.Schedule(model, stages, total_steps=steps) if stages else None
        run = torch.compile(model, backend="fxquant_eager", dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for x, y in batches(100 + seed, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), y)
        (loss if schedule is None else loss + schedule.damping()).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()
    with torch.no_grad():
        out = run(X[TRAIN:])
    return 100 * (out.argmax(1) == Y[TRAIN:]).float().mean().item(), F.cross_entropy(out, Y[TRAIN:]).item()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--only", default=";".join(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("build/schedules.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts = [start(seed) for seed in range(options.seeds)]
    rows = []
    for name in options.only.split(";"):
        found = [trained(copy.deepcopy(model), VARIANTS[name], s, options.steps) for s, model in enumerate(starts)]
        row: dict[str, object] = {"variant": name}
        for key, values in zip(("accuracy", "cross_entropy"), torch.tensor(found, dtype=torch.float64).T, strict=True):
            row |= {key: round(values.mean().item(), 4), f"{key}_deviation": round(values.std().item(), 4)}
        emit([row | {"seeds": options.seeds, "steps": options.steps} | environment()], options.out)
        rows.append(list(row.values()))
    print(table(["variant", "accuracy", "±", "cross entropy", "±"], rows))


if __name__ == "__main__":
    main()
