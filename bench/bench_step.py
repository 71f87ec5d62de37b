"""Time and saved bytes of a QAT step against the plain compiled step, interleaved in one process.

    python bench/bench_step.py [--steps 15] [--nets cnn,transformer] [--out bench/results/step.jsonl]

A JSON line per net and variant: median seconds of forward + backward, its ratio to plain, bytes that autograd
keeps for backward (parameters excluded) and their ratio. Before timing, compiled gradients are held to those of
`fxquant_eager`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import emit, environment
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant

Step = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Residual block of two 3×3 convolutions with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + x)


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *(Block(32) for _ in range(4))),
        torch.randn(32, 3, 32, 32),
    ),
    "transformer": lambda: (nn.Sequential(*(Layer(256) for _ in range(4))), torch.randn(16, 128, 256)),
}


def saved_bytes(model: nn.Module, step: Step, x: Tensor) -> int:
    """What autograd keeps between forward and backward, each storage once, parameters and inputs excluded."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step(x).square().mean()
    loss.backward()
    return sum(kept.values())


def gradients(model: nn.Module, step: Step, x: Tensor) -> list[Tensor]:
    """Gradients of one step, taken off the model again."""
    step(x).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def check(model: nn.Module, x: Tensor) -> None:
    """Compiled gradients equal the eager oracle's but for codes that float32 noise moved: at most 1.6e-2 was seen."""
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    compiled = gradients(first, torch.compile(first, backend="fxquant"), x)
    eager = gradients(second, torch.compile(second, backend="fxquant_eager"), x)
    for ours, oracle in zip(compiled, eager, strict=True):
        error = (ours - oracle).norm() / oracle.norm().clamp(min=1e-12)
        assert error < 2e-2, f"compiled gradient is off by {error:.2e}"


def timed(variants: dict[str, tuple[nn.Module, Step]], x: Tensor, steps: int) -> dict[str, float]:
    """Median seconds of forward and backward, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, (model, step) in variants.items():
            started = time.perf_counter()
            step(x).square().mean().backward()
            times[name].append(time.perf_counter() - started)
            model.zero_grad()
    return {name: statistics.median(values) for name, values in times.items()}


def run(net: str, steps: int) -> list[dict[str, object]]:
    """Rows of one net."""
    torch.manual_seed(0)
    model, x = NETS[net]()
    plain, prepared = copy.deepcopy(model), fxquant.prepare(copy.deepcopy(model), (x,))
    check(prepared, x)
    variants: dict[str, tuple[nn.Module, Step]] = {
        "plain": (plain, torch.compile(plain)),
        "fxquant int8": (prepared, torch.compile(prepared, backend="fxquant")),
    }
    for each, step in variants.values():
        gradients(each, step, x)
    seconds = timed(variants, x, steps)
    kept = {name: saved_bytes(each, step, x) for name, (each, step) in variants.items()}
    return [
        {
            "net": net,
            "variant": name,
            "step_seconds": round(seconds[name], 5),
            "step_ratio": round(seconds[name] / seconds["plain"], 3),
            "saved_bytes": kept[name],
            "saved_ratio": round(kept[name] / kept["plain"], 3),
            "steps": steps,
            **environment(),
        }
        for name in variants
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for net in options.nets.split(","):
        emit(run(net, options.steps), options.out)


if __name__ == "__main__":
    main()
