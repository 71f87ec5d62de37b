"""README.md's tables and picture, from the rows in bench/results: neither says what the other does not.

    python bench/readme.py [--check]

Of each net and variant the newest row counts. ``--check`` writes nothing, and fails where the page is another.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by bench/readme.py from bench/results -->", "<!-- end of what bench/readme.py writes -->"

Row = Mapping[str, Any]

STEPS = {"cnn": "CNN with BatchNorm", "transformer": "transformer", "zoo": "ViT of transformers 5"}
TOOLS = {
    "**fxquant**": ("fxquant int8",),
    "**fxquant**, backward on integers too": ("fxquant integer step",),
    "ModelOpt": ("modelopt eager", "modelopt"),
    "torchao, PT2E": ("torchao pt2e eager",),
    "torch's FakeQuantize modules": ("torch FakeQuantize eager", "torch FakeQuantize"),
    "Brevitas": ("brevitas eager",),
}
FILES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "efficientnet_b0": "EfficientNet-B0",
    "unet": "U-Net, half of its width",
    "yolov8n": "YOLOv8n, 320×320",
    "vit_tiny": "ViT-tiny",
    "minilm": "MiniLM-like",
    "bert_base": "BERT-base",
}
LOSSES = {"int8": "int8", "w4a8": "w4a8", "w4a4": "w4a4"}
READERS = {"**fxquant**": ("fxquant", "fxquant tokens"), "torchao": ("torchao",), "Brevitas": ("brevitas",)}


def read(name: str) -> list[Row]:
    """The rows of a file of results."""
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def newest(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The last of the rows with these values that has the latest date."""
    fitting = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return max(reversed(fitting), key=lambda row: str(row["date"]), default=None)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def measured_on(rows: Sequence[Row], *more: str) -> str:
    """Machine, versions and dates of the rows that a table is made of."""
    dates = sorted({str(row["date"]) for row in rows})
    versions = sorted({f"torch {str(row['torch']).partition('+')[0]}" for row in rows})
    machines = sorted({str(row["cpu"]).replace("(R)", "") for row in rows})
    threads = sorted({f"{row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "; ".join([", ".join(versions), *more, " and ".join(machines), " and ".join(threads), when])


def steps() -> str:
    """What a step costs, beside other tools: the faster of their eager and compiled runs."""
    rows, used, lines = read("step"), [], []
    for tool, variants in TOOLS.items():
        cells = [tool]
        for net in STEPS:
            candidates = [newest(rows, net=net, dtype="fp32", variant=variant) for variant in variants]
            found = min(filter(None, candidates), key=lambda row: row["step_ratio"], default=None)
            cells.append("" if found is None else f"{found['step_ratio']:.2f} / {found['saved_ratio']:.2f}")
            used += [found] if found else []
        lines.append(cells)
    head = ["a training step, float32 = 1.00: time / bytes kept for backward", *STEPS.values()]
    return f"{table(head, lines)}\n\n{measured_on(used)} (`bench/bench_step.py`)."


def files() -> str:
    """What a file takes in its runtime, of the float file's time there."""
    rows, used, lines = read("latency"), [], []
    columns: dict[str, tuple[str, Callable[[Row], object]]] = {
        "onnxruntime": ("onnxruntime", lambda row: row.get("skip_slow_ratio")),
        "its `quantize_static`": ("onnxruntime", lambda row: row.get("static_ratio")),
        "OpenVINO": ("openvino", lambda row: row["ratio"]),
        "NNCF, in OpenVINO": ("openvino", lambda row: row.get("nncf_ratio")),
    }
    for net, name in FILES.items():
        cells = [name]
        for runtime, value in columns.values():
            row = newest(rows, net=net, runtime=runtime, threads=1)
            ratio = None if row is None else value(row)
            cells.append("" if ratio is None else f"{ratio:.2f}")
            used += [row] if row else []
        lines.append(cells)
    head = ["an int8 file, one example; the float file = 1.00", *columns]
    versions = sorted({f"{row['runtime']} {row['version']}" for row in used})
    said = measured_on(used, *versions)
    return f"{table(head, lines)}\n\n{said} (`bench/bench_latency.py`; onnxruntime's with `skip_slow=True`)."


def losses() -> str:
    """What a small language model loses to float in as many steps, by format and tool."""
    rows = [row for row in read("accuracy") if row["task"] == "language" and row["value"] is not None]
    floats = {row["seed"]: row["value"] for row in rows if row["tool"] == "float"}
    used, lines = [], []
    for tool, names in READERS.items():
        cells = [tool]
        for form in LOSSES:
            best: tuple[float, str] | None = None
            for name in names:
                mine = [row for row in rows if (row["tool"], row["format"]) == (name, form)]
                lost = [row["value"] - floats[row["seed"]] for row in mine]
                if len(lost) > 1:
                    mean, deviation = statistics.mean(lost), statistics.stdev(lost)
                    best = min(filter(None, (best, (mean, f"{mean:.3f} ± {deviation:.3f}"))))
                    used += mine
            cells.append(best[1] if best else "")
        lines.append(cells)
    head = ["a character language model, loss above float's, nats", *LOSSES.values()]
    notes = "fxquant's w4a4 is recipe `w4a4_dynamic`, torchao's leaves attention in float; empty: not run"
    return f"{table(head, lines)}\n\n{measured_on(used)}; 3 seeds, 100 steps; {notes} (`bench/bench_accuracy.py`)."


class Residual(nn.Module):
    """Two convolutions around which their input goes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.two(functional.relu(self.norm(self.one(x)))))


def draw(path: Path) -> None:
    """The plan of a small net, as `fxquant.explain` draws it."""
    import fxquant

    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*stem, Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x = torch.zeros(2, 3, 16, 16)
    fxquant.prepare(model, (x,))
    text = fxquant.explain(model, (x,)).svg()
    path.write_text(re.sub(rf"\n?{re.escape(str(ROOT))}[^\n<]*:\d+", "", text), encoding="utf-8")  # lines of this file


def page(text: str) -> str:
    """The README with the tables that the rows make. Raises ValueError for one without the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold {BEGIN!r} and {END!r}.")
    return "\n\n".join([before + BEGIN, steps(), files(), losses(), END + after])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    found = page(text)
    if not parser.parse_args().check:
        path.write_text(found, encoding="utf-8")
        draw(ROOT / "docs" / "images" / "plan.svg")
    elif found != text:
        sys.exit("README.md is not what bench/results say: run python bench/readme.py")


if __name__ == "__main__":
    main()
