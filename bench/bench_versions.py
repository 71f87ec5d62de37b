"""Small files in the oldest and the newest version of each runtime: whether they load at every level, and their codes.

    python bench/bench_versions.py [--versions onnxruntime==1.20.0,onnxruntime==1.32.0,openvino==2025.3.0,…]
                                   [--out bench/results/versions.jsonl]

Files and inputs are made in this environment; each version gets a virtual environment of its own, with numpy alone
beside it, in a temporary folder, and runs them there. ``off``: values of the outputs that are further than 1/255 of
their range from those of this environment's onnxruntime without optimizations. A JSON line per version, file and level.

Exit status 1 where a file for a runtime does not load there, or has values that are off, but for what is said of CPUs
without VNNI: there 8-bit weights make sums saturate in optimized kernels, of all versions alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
import warnings
from pathlib import Path

import numpy as np
import torch
from machine import emit, environment
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.targets.cpu import sums_saturate
from fxquant.targets.session import input_names, run_outputs

# The oldest that pyproject.toml allows, and the newest when this was written.
VERSIONS = "onnxruntime==1.20.0,onnxruntime==1.32.0,openvino==2025.3.0,openvino==2026.4.1"
RECIPES = {"onnxruntime": ("int8", "w4a8", "w4a4", "w4a4_dynamic"), "openvino": ("int8", "w4a8", "w4a4")}

# Runs in the other environment: no fxquant, no torch.
CHILD = """
import json, sys
import numpy as np

def onnxruntime(path, x):
    import onnxruntime as ort
    names = {"disable": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED",
             "layout": "ORT_ENABLE_LAYOUT", "all": "ORT_ENABLE_ALL"}
    for level, name in names.items():
        if hasattr(ort.GraphOptimizationLevel, name):
            yield level, lambda: run(ort, getattr(ort.GraphOptimizationLevel, name), path, x)

def run(ort, level, path, x):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]

def openvino(path, x):
    import openvino
    compile = openvino.Core().compile_model
    for precision in ("f32", "default"):
        config = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "f32" else {}
        yield precision, lambda: compile(path, "CPU", config)(x)[0]

for path in sys.argv[2:]:
    held = np.load(path.removesuffix(".onnx") + ".npz")
    for level, call in globals()[sys.argv[1]](path, held["x"]):
        try:
            found, why = call(), None
        except Exception as error:
            told = [line for line in str(error).splitlines() if line and not line.startswith("Exception from")]
            found, why = None, " ".join(told)[:300] or type(error).__name__
        expected = held["y"]
        off = None if found is None else int((abs(found - expected) > np.ptp(expected) / 255).sum())
        row = {"file": path.rpartition("/")[2], "level": level, "off": off, "of": expected.size, "error": why}
        print(json.dumps(row))
"""


class ConvNet(nn.Module):
    """Convolutions, one padded and one of groups, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((F.relu(self.group(x)) + x).mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "convnet": (ConvNet, (2, 3, 16, 16)),
    "attention": (Attention, (2, 8, 32)),
}


def make(folder: Path) -> None:
    """The files, each with its input and the output that it must give."""
    for name, (net, shape) in NETS.items():
        for target, recipes in RECIPES.items():
            for recipe in recipes:
                torch.manual_seed(0)
                x, path = torch.randn(shape), folder / f"{name}.{target}.{recipe}.onnx"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = fxquant.prepare(net(), (x,), target=target, recipe=recipe)
                    fxquant.calibrate(model, [x], progress=False)
                    fxquant.export_onnx(model.eval(), (x,), path, dynamic_batch=False)
                (y,) = run_outputs(path, {input_names(path)[0]: x.numpy()}, optimize=False)
                np.savez(path.with_suffix(".npz"), x=x.numpy(), y=y)


Row = dict[str, object]


def rows(version: str, folder: Path) -> list[Row]:
    """What one version makes of the files, in an environment of its own."""
    runtime, home = version.partition("==")[0], folder / version
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", version, "numpy"], check=True)
    files = sorted(map(str, folder.glob("*.onnx")))
    ran = subprocess.run([python, "-c", CHILD, runtime, *files], check=True, stdout=subprocess.PIPE, text=True)
    return [{"version": version, **json.loads(line)} for line in ran.stdout.splitlines() if line.startswith("{")]


def why_wrong(row: Row, *, saturates: bool) -> str | None:
    """What is wrong with a row; None where nothing is, or the file is for another runtime."""
    _, target, recipe, _ = str(row["file"]).split(".")
    if not str(row["version"]).startswith(f"{target}=="):
        return None
    where = f"{row['file']} in {row['version']}, {row['level']}"
    if row["error"] is not None:
        return f"{where}: {row['error']}"
    expected = saturates and recipe == "int8" and row["level"] not in ("disable", "basic")
    return f"{where}: {row['off']} of {row['of']} values are off" if row["off"] and not expected else None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default=VERSIONS)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        wrong: list[str] = []
        for version in chosen.versions.split(","):
            found = rows(version, Path(name))
            emit(({**row, **environment()} for row in found), chosen.out)
            wrong += filter(None, (why_wrong(row, saturates=sums_saturate()) for row in found))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
