"""How near gradients of integer backward products are to those of float ones, as training goes on.

    python bench/bench_gradients.py [--tasks vit,language] [--seeds 0,1,2] [--steps 100] [--outliers 0.01]
                                    [--starts build/accuracy] [--out bench/results/gradients.jsonl]

A net of `accuracy_tasks.py` trains at int8 from its float start, with products of codes in backward. Before the first
step, after half of them and after the last, its gradients are taken twice of one batch and one state: with float
products in backward, and with those of codes (``options={"integer_backward": True}``, or with a share of outliers in
float); forward multiplies codes in both. A JSON line per task, seed and time: the cosine between both gradients, for
the parameter where it is least and in the middle of all, and the losses of the step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy_tasks import TASKS, Task
from accuracy_tools import EAGER
from bench_accuracy import CALIBRATION, WEIGHT_DECAY, float_start, listed, rate
from machine import emit, environment
from table import show
from torch import Tensor, nn

import fxquant

Row = dict[str, Any]
BACKWARDS = ("float", "integer")


def gradients(task: Task, model: nn.Module, step: Any, batch: tuple[Tensor, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch; the model is left as it was."""
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss = task.loss(step(batch[0]), batch[1])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return loss.item(), found


def compared(task: Task, model: nn.Module, steps: dict[str, Any], batch: tuple[Tensor, Tensor]) -> Row:
    """The measured fields of a row."""
    (loss, exact), (again, found) = (gradients(task, model, steps[name], batch) for name in BACKWARDS)
    cosines = {
        name: torch.cosine_similarity(found[name].double().flatten(), value.double().flatten(), 0).item()
        for name, value in exact.items()
        if value.abs().max() > 0
    }
    least = min(cosines, key=lambda name: cosines[name])
    return {
        "loss": round(loss, 5),
        "loss_again": round(again, 5),
        "parameters": len(cosines),
        "least": round(cosines[least], 6),
        "of": least,
        "middle": round(statistics.median(cosines.values()), 6),
    }


def run(name: str, seed: int, steps: int, outliers: float, starts: Path) -> Iterator[Row]:
    """Rows of one training."""
    backward = {"mode": True, "outliers": outliers}
    options = {"float": {"integer_matmul": True}, "integer": {"integer_matmul": True, "integer_backward": backward}}
    task = TASKS[name]
    model = float_start(name, seed, starts)
    batches = list(itertools.islice(task.batches(1000 + seed), max(steps, CALIBRATION)))
    fxquant.prepare(model.train(), (batches[0][0],), target="generic")
    fxquant.calibrate(model, [(x,) for x, _ in batches[:CALIBRATION]], progress=False)
    compiled = {key: torch.compile(model, backend=EAGER, dynamic=False, options=options[key]) for key in BACKWARDS}
    optimizer = torch.optim.AdamW(fxquant.parameter_groups(model, lr=task.rate / 10), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    torch.manual_seed(1000 + seed)
    for step in range(steps + 1):
        x, target = batches[step % len(batches)]
        if step in (0, steps // 2, steps):
            found = compared(task, model, compiled, (x, target))
            where = {"task": name, "format": "int8", "outliers": outliers, "seed": seed, "step": step}
            yield {**where, **found, **environment()}
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            task.loss(compiled["integer"](x), target).backward()
            optimizer.step()
            schedule.step()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=listed(TASKS), default=["vit", "language"])
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--outliers", type=float, default=0.0, help="the share of each sum that stays float")
    parser.add_argument("--starts", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name, seed in itertools.product(options.tasks, options.seeds):
        torch._dynamo.reset()
        for row in run(name, seed, options.steps, options.outliers, options.starts):
            emit([row], options.out)
            rows.append(row)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
