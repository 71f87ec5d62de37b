"""Accuracy after quantization-aware training, by format: fxquant and others from one float start, for as many steps.

    python bench/bench_accuracy.py [--tasks cnn,vit,language,pitch] [--tools fxquant,brevitas] [--formats int8,w4a4]
                                   [--seeds 0,1,2] [--steps 100] [--starts build/accuracy]
                                   [--out bench/results/accuracy.jsonl]
    python bench/bench_accuracy.py --summary bench/results/accuracy.jsonl

A net is trained in float once a seed and kept in ``--starts`` (`accuracy_tasks.py`). From there each tool
(`accuracy_tools.py`) prepares it, looks at the same eight batches, and trains ``--steps`` steps at a tenth of the float
rate, with the same batches, optimizer and schedule; the tool "float" goes on in float, and is what the others are held
to. A JSON line per task, tool, format and seed: the metric on held-out data of the float start, after calibration, and
after training. A format that a tool or a task has not is a line with the reason in ``why`` and no value. Rows that
``--out`` holds already are not made again, so that a run can go on.

fxquant trains on ``fxquant_eager``, whose numbers are the compiled ones'. ``--summary`` gives means and deviations over
seeds, and what they differ from float continued, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accuracy_tasks import TASKS, Forward, Task
from accuracy_tools import FORMATS, TOOLS, Built, Tool
from machine import emit, environment
from nets import Unavailable
from table import show
from torch import nn

Row = dict[str, Any]
KEY = ("task", "tool", "format", "seed", "steps")
CALIBRATION, WARM_UP, WEIGHT_DECAY = 8, 0.1, 0.05
FLOAT = "float"


def rate(step: int, total: int) -> float:
    """The learning rate as a share of its peak: a linear rise over a tenth of all steps, then a cosine to zero."""
    rising = max(1, round(WARM_UP * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def train(task: Task, built: Built, steps: int, peak: float, seed: int) -> None:
    """Steps of AdamW on batches of that seed."""
    torch.manual_seed(seed)
    built.model.train()
    optimizer = torch.optim.AdamW(built.groups(peak), lr=peak, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for x, target in itertools.islice(task.batches(seed), steps):
        loss = task.loss(built.forward(x), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(task: Task, model: nn.Module, forward: Forward) -> float:
    """The metric on all that is held out."""
    model.eval()
    sums = [task.right(forward(x), target) for x, target in task.held_out()]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def float_start(name: str, seed: int, folder: Path, steps: int | None = None) -> nn.Module:
    """The float net of that seed, trained once and kept in ``folder``."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = task.build()
    steps = task.steps if steps is None else steps
    path = folder / f"{name}-{seed}-{steps}.pt"
    if not path.exists():
        train(task, Built.plain(model), steps, task.rate, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)  # another process may look for it
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def made(name: str, tool: Tool, format: str, seed: int, steps: int, model: nn.Module) -> Row:
    """What one tool makes of a float start: the measured fields of a row."""
    task = TASKS[name]
    first = list(itertools.islice(task.batches(1000 + seed), CALIBRATION))
    row: Row = {"start": round(measured(task, model, model), 4)}
    built = tool.build(model.train(), [x for x, _ in first], format)
    row["calibrated"] = round(measured(task, built.model, built.forward), 4)
    train(task, built, steps, task.rate / 10, 1000 + seed)
    row["value"] = round(measured(task, built.model, built.forward), 4)
    return {**row, "runs_on": built.runs_on, "layers": built.layers, "why": None}


def one(name: str, tool: str, format: str, seed: int, options: argparse.Namespace) -> Row:
    """A row; one without a value, and with the reason, where the tool or the task has no such format."""
    facts: Row = {"start": None, "calibrated": None, "value": None, "runs_on": None, "layers": None}
    try:
        model = float_start(name, seed, options.starts, options.float_steps)
        facts = made(name, TOOLS[tool], format, seed, options.steps, model)
    except Exception as error:
        if TOOLS[tool].ours and not isinstance(error, Unavailable):
            raise
        kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
        facts["why"] = (kind + " ".join(str(error).split()))[:300]
    key = dict(zip(KEY, (name, tool, format, seed, options.steps), strict=True))
    shorter = {} if options.float_steps is None else {"float_steps": options.float_steps}
    return {**key, "unit": TASKS[name].unit, **facts, **shorter, **environment()}


def run(options: argparse.Namespace) -> Iterable[Row]:
    """All rows that are asked for and not there; the seeds of a format one after the other, which share its graphs."""
    done = {tuple(row[k] for k in KEY) for row in read(options.out)} if options.out and options.out.exists() else set()
    for name, tool in itertools.product(options.tasks, options.tools):
        for format in ["float32"] if tool == FLOAT else options.formats:
            torch._dynamo.reset()
            for seed in options.seeds:
                if (name, tool, format, seed, options.steps) not in done:
                    yield one(name, tool, format, seed, options)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(values: list[float]) -> str:
    """``mean ± deviation``, the deviation of the sample."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def summary(rows: list[Row]) -> list[Row]:
    """A line per task, format and tool: means and deviations, and what is lost to float continued, by seed."""
    lines: list[Row] = []
    floats = {(r["task"], r["seed"], r["steps"]): r["value"] for r in rows if r["tool"] == FLOAT}
    order = [FLOAT, *FORMATS]
    keys = dict.fromkeys((r["task"], r["format"], r["tool"], r["steps"]) for r in rows)
    known = sorted(keys, key=lambda k: (list(TASKS).index(k[0]), [*order, "float32"].index(k[1])))
    for name, format, tool, steps in known:
        group = [r for r in rows if (r["task"], r["format"], r["tool"], r["steps"]) == (name, format, tool, steps)]
        found = [r for r in group if r["value"] is not None]
        line: Row = {"task": name, "format": format, "tool": tool, "steps": steps, "seeds": len(found)}
        line |= dict.fromkeys(("start", "calibrated", "trained", "lost", "bound", "within"), "")
        if found:
            sign = 1 if TASKS[name].unit == "nats" else -1
            for column, field in (("start", "start"), ("calibrated", "calibrated"), ("trained", "value")):
                line[column] = spread([r[field] for r in found])
            lost = [sign * (r["value"] - floats[key]) for r in found if (key := (name, r["seed"], steps)) in floats]
            line["lost"] = spread(lost) if lost else ""
            bound = TASKS[name].bounds.get(format)
            if bound is not None and lost:
                line["bound"], line["within"] = bound, "yes" if statistics.mean(lost) <= bound else "no"
        else:
            line["trained"] = group[0]["why"][:60]
        lines.append(line)
    return lines


def listed(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Parses comma-separated names among the known ones."""
    names = list(known)

    def parse(text: str) -> list[str]:
        unknown = [word for word in text.split(",") if word not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(names)}: got {', '.join(unknown)}.")
        return text.split(",")

    return parse


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, known in (("tasks", list(TASKS)), ("tools", list(TOOLS)), ("formats", list(FORMATS))):
        parser.add_argument(f"--{flag}", type=listed(known), default=known)
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--float-steps", type=int, help="of float training, if not the task's own")
    parser.add_argument("--starts", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--summary", type=Path, help="print the table of a file, and train nothing")
    return parser


def main() -> int:
    """Command line."""
    options = arguments().parse_args()
    if options.summary:
        show(summary(read(options.summary)))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for row in run(options):
        emit([row], options.out)
        rows.append(row)
    show(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
