"""What TensorRT for RTX computes on a card: outputs of a file beside the standard's, and how long a run takes.

    python bench/gpu/tensorrt_outputs.py [--recipes int8,fp8,nvfp4] [--dtypes float32,float16,bfloat16]
                                         [--device cpu] [--out rows.jsonl]

A convolutional net and a transformer block of each recipe and type are exported, built for this card and run on it. A
row says how far the outputs are from those of onnxruntime without optimizations (or of our evaluator of NVIDIA's own
operators), as a part of their spread, and the median seconds of a run. What the card lacks is a row with the reason.
``--device cpu`` builds the same plans, for a card that the builder chooses, and runs none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import emit, environment

import fxquant
from fxquant.targets.session import run_outputs
from fxquant.targets.tensorrt_build import build
from fxquant.targets.tensorrt_run import CAPABILITIES

Row = dict[str, Any]


class Block(nn.Module):
    """Attention of two heads and a feed-forward net, with its norms."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def nets() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Name, model and inputs."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    yield "cnn", nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 64)), torch.randn(4, 3, 8, 8)
    yield "block", Block(), torch.randn(4, 16, 64)


def planned(path: Path, feeds: Mapping[str, np.ndarray], capability: str | None) -> Path:
    """The file's plan, beside it. Raises RuntimeError with NVIDIA's words."""
    plan = path.with_suffix(".plan")
    card = None if capability is None else [int(part) for part in capability.split(".")]
    shapes = {name: list(value.shape) for name, value in feeds.items()}
    asked = {"model": str(path), "plan": str(plan), "location": str(path), "shapes": shapes, "capability": card}
    answer = build(asked)
    if not answer["built"]:
        raise RuntimeError("; ".join(text for kind, text in answer["log"] if kind == "error") or str(answer["errors"]))
    return plan


def run(plan: Path, feeds: Mapping[str, np.ndarray], rounds: int = 50) -> tuple[dict[str, np.ndarray], float]:
    """Outputs by name and the median seconds of a run, on the first CUDA device."""
    import tensorrt_rtx as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    context = engine.create_execution_context()
    held, outputs = {name: torch.from_numpy(value).cuda() for name, value in feeds.items()}, {}
    for name, value in held.items():
        context.set_input_shape(name, tuple(value.shape))
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if name not in held:
            kind = getattr(torch, {"float": "float32", "half": "float16", "bf16": "bfloat16"}[_kind(engine, name)])
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device="cuda")
        context.set_tensor_address(name, (held | outputs)[name].data_ptr())
    stream, seconds = torch.cuda.Stream(), []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        seconds.append(time.perf_counter() - start)
    return {name: value.float().cpu().numpy() for name, value in outputs.items()}, statistics.median(seconds)


def _kind(engine: Any, name: str) -> str:
    return str(engine.get_tensor_dtype(name)).rpartition(".")[2].lower()


def compared(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest distance of an output, as a part of its spread."""
    return max(
        float(np.abs(found[name] - value.astype(np.float32)).max() / np.ptp(value.astype(np.float32)))
        for name, value in expected.items()
    )


def measure(model: nn.Module, x: torch.Tensor, recipe: str, dtype: str, card: str | None) -> Row:
    """The row of one net, recipe and type, run where there is a ``card``; what failed is its ``error``."""
    import onnx

    row: Row = {"recipe": recipe, "dtype": dtype, "capability": card, **environment()}
    try:
        prepared = fxquant.prepare(model, (x,), recipe=recipe, target="tensorrt")
        fxquant.calibrate(prepared, [x], progress=False)
        with tempfile.TemporaryDirectory() as folder:
            path, kind = Path(folder) / "net.onnx", getattr(torch, dtype)
            fxquant.export_onnx(prepared.eval(), (x,), path, float_dtype=kind, io_dtype=torch.float32, capability=card)
            graph = onnx.load(path).graph
            feeds = {graph.input[0].name: x.numpy()}
            names = [value.name for value in graph.output]
            expected = dict(zip(names, run_outputs(path, feeds, optimize=False), strict=True))
            plan = planned(path, feeds, card if card in CAPABILITIES else None)
            row["plan_bytes"] = plan.stat().st_size
            if card is not None:
                found, row["seconds"] = run(plan, feeds)
                row["difference"] = compared(found, expected)
    except Exception as error:  # what fails is the result
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    return row


def main() -> int:
    """The command line; 1 where a build or a run failed for another reason than what the card lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="int8,fp8,nvfp4,int4_weight_only")
    parser.add_argument("--dtypes", default="float32,float16,bfloat16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    card = None if options.device == "cpu" else ".".join(map(str, torch.cuda.get_device_capability()))
    failed = 0
    for recipe in options.recipes.split(","):
        for dtype in options.dtypes.split(","):
            for name, model, x in nets():
                row = {"net": name, **measure(model, x, recipe, dtype, card)}
                emit([row], options.out)
                failed += "error" in row and "capability must be" not in row["error"]
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
