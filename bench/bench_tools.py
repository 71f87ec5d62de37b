"""What fxquant's tools take themselves at real size: seconds and memory of prepare, calibrate, export and verify.

    python bench/bench_tools.py [--nets bert_base,resnet50] [--repeats 3] [--out bench/results/tools.jsonl]

The nets of `latency_nets`, prepared for onnxruntime. Each repeat takes a fresh copy through all steps in turn, in one
process, with the float model's plain ``torch.onnx.export`` among them, which is what an export is compared with;
medians of seconds, after one round that does not count. Both exports leave the batch open. ``_mib``: the most memory
that a step had beyond what the process had before it, sampled every 5 ms, of a process of its own: memory that was once
had is kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from latency_nets import NETS, build
from machine import emit, environment
from nets import Unavailable
from torch import Tensor, nn

import fxquant

STEPS = ("prepare", "calibrate", "plain_export", "export", "verify")


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The most memory while it is entered."""

    def __enter__(self) -> Peak:
        self.highest = self.before = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.highest = max(self.highest, resident())

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self.highest = max(self.highest, resident())


def steps(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """The steps, to be run in order."""
    held: dict[str, nn.Module] = {}

    def prepare() -> None:
        held["model"] = fxquant.prepare(held["copy"], (x,), target="onnxruntime")

    def export() -> None:
        fxquant.export_onnx(held["model"].eval(), (x,), folder / "int8.onnx", verify=False)

    def plain() -> None:
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        at = folder / "float.onnx"
        torch.onnx.export(model, (two,), at, dynamo=True, opset_version=21, dynamic_shapes=sizes, verbose=False)

    held["copy"], two = copy.deepcopy(model), torch.cat([x, x])  # a size of one would stay fixed
    return {
        "prepare": prepare,
        "calibrate": lambda: fxquant.calibrate(held["model"], [x], progress=False),
        "plain_export": plain,
        "export": export,
        "verify": lambda: fxquant.verify_onnx(held["model"], (x,), folder / "int8.onnx", rounds=0),
    }


def one_round(name: str) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each step."""
    model, x = build(name)
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, step in steps(model, x, Path(folder)).items():
            with Peak() as peak:
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
            found[key] = (seconds, peak.highest - peak.before)
    return found


def memory(name: str) -> dict[str, int]:
    """Bytes of each step in a process of its own."""
    code = f"import json, bench_tools; print(json.dumps(bench_tools.one_round({name!r})))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return {key: size for key, (_, size) in json.loads(ran.stdout.splitlines()[-1]).items()}


def measure(name: str, repeats: int) -> dict[str, object]:
    """The row of a net."""
    one_round(name)
    rounds = [one_round(name) for _ in range(repeats)]
    seconds = {key: statistics.median(found[key][0] for found in rounds) for key in STEPS}
    return {
        "net": name,
        **{f"{key}_s": round(value, 2) for key, value in seconds.items()},
        "export_ratio": round(statistics.median(r["export"][0] / r["plain_export"][0] for r in rounds), 2),
        **{f"{key}_mib": round(size / 2**20) for key, size in memory(name).items()},
        "repeats": repeats,
        **environment(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="bert_base,resnet50", help=f"of {', '.join(NETS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in options.nets.split(","):
        try:
            row = measure(name, options.repeats)
        except Unavailable as error:
            row = {"net": name, "unavailable": str(error), **environment()}
        emit([row], options.out)


if __name__ == "__main__":
    main()
