"""Whole training steps, forward and backward under bf16 autocast, of a ResNet-50 and a transformer, against plain.

Variants are those of bench/variants.py, built on the device; they take turns. Before a net is timed its losses are
held to the float net's; gradients are held to those of `fxquant_eager` on small nets of the same layers (`check`).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bench_memory import peak_bytes as peak_on_cpu
from bench_step import Graphs, check_gradients, check_loss, gradients, left_out, saved_bytes
from clock import Budget, Clock, Notes
from kernels import Graph, watch
from nets import Layer, Unavailable
from sizes import Sizes
from torch import Tensor, nn
from torch.nn import functional as F
from variants import VARIANTS, Built, Step, autocast

Row = dict[str, object]
DTYPE = "bf16"
COUNTS = tuple(field.name for field in dataclasses.fields(Graph))


class Bottleneck(nn.Module):
    """ResNet's block of 1×1, 3×3 and 1×1 convolutions, four times as wide at its ends (He et al., 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))
            if stride != 1 or inputs != 4 * width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.shortcut(x))


def resnet(sizes: Sizes) -> tuple[nn.Module, Tensor]:
    """ResNet-50 where stages are (3, 4, 6, 3) and channels 64."""
    inputs = sizes.channels
    blocks: list[nn.Module] = []
    for stage, count in enumerate(sizes.stages):
        width = sizes.channels * 2**stage
        for number in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if stage and not number else 1))
            inputs = 4 * width
    stem = (nn.Conv2d(3, sizes.channels, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(sizes.channels), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    model = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), *blocks, *head)
    return model, torch.randn(sizes.images, 3, sizes.side, sizes.side)


def transformer(sizes: Sizes) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(*(Layer(sizes.width, sizes.heads) for _ in range(sizes.layers)))
    return model, torch.randn(sizes.batch, sizes.tokens, sizes.width)


BUILDERS: dict[str, Callable[[Sizes], tuple[nn.Module, Tensor]]] = {"transformer": transformer, "resnet": resnet}
# In this order, so that the figures that are asked for come before the time is used up.
JOBS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("transformer", ("plain", "fxquant int8", "fxquant integer matmul")),
    ("resnet", ("plain", "fxquant int8")),
    ("transformer", ("plain", "fxquant delayed ranges", "fxquant floats saved")),
)


@dataclass
class Ready:
    """A variant that is compiled and warm."""

    model: nn.Module
    step: Step
    facts: Row


def check(device: str, sizes: Sizes, nets: Sequence[str], notes: Notes) -> Iterator[Row]:
    """How far gradients of small compiled nets are off those of `fxquant_eager`, a row each; too far is a failure."""
    for net in nets:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = (each.to(device) for each in BUILDERS[net](sizes))
        try:
            found = {}
            for backend in ("fxquant_eager", "fxquant"):
                trained, step = VARIANTS["fxquant int8"].build(copy.deepcopy(model), x, backend=backend)
                found[backend] = [gradients(trained, autocast(step, DTYPE), x) for _ in range(2)]
            error = check_gradients(found["fxquant"], found["fxquant_eager"], DTYPE)
        except Exception as failure:
            notes.fail(f"check {net}", failure)
        else:
            yield {"check": net, "gradient_error": float(f"{error:.1e}")}


def ready(net: str, name: str, sizes: Sizes, device: str, notes: Notes) -> Ready:
    """Builds, compiles and checks one variant."""
    torch.manual_seed(0)
    model, x = BUILDERS[net](sizes)
    model, x = model.to(device), x.to(device)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        loss = autocast(reference, DTYPE)(x).square().mean().item()
    del reference
    trained, step = VARIANTS[name].build(model, x)
    step = autocast(step, DTYPE)
    graphs = Graphs()
    try:
        with watch(trained, x) as made:
            twice(trained, step, x)
        counts = made.fields()
    except Exception as error:  # private API: another version of torch may not be counted, but can be timed
        notes.say(f"not counted: {net} {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        torch._dynamo.reset()
        twice(trained, step, x)
        counts = {}
    facts: Row = {**dict.fromkeys(COUNTS), **counts, "graph_breaks": graphs.breaks}
    check_loss(trained, step, x, loss)
    return Ready(trained, step, facts)


def twice(model: nn.Module, step: Step, x: Tensor) -> None:
    """Two steps: ranges are set after the first, and another graph may take over."""
    for _ in range(2):
        backward(model, step, x)


def backward(model: nn.Module, step: Step, x: Tensor) -> None:
    """One training step without the optimizer."""
    step(x).square().mean().backward()
    model.zero_grad()


def peak_bytes(each: Ready, x: Tensor) -> int:
    """max_memory_allocated of a step, as if only this variant were on the device; on CPU what the profiler counts."""
    own = sum(t.nbytes for t in (*each.model.parameters(), *each.model.buffers())) + x.nbytes
    if x.device.type == "cpu":
        return peak_on_cpu(each.model, each.step, x) + own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(each.model, each.step, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + own


def launches(each: Ready, x: Tensor) -> int | None:
    """Kernels that one step launches, by the profiler; None on CPU, and where it traces nothing."""
    if x.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        backward(each.model, each.step, x)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda and "Mem" not in event.name for event in profiler.events()) or None


def ready_variants(
    net: str, names: Sequence[str], sizes: Sizes, device: str, budget: Budget, notes: Notes
) -> dict[str, Ready]:
    """The variants that run here and fit the time."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    found: dict[str, Ready] = {}
    for name in names:
        if budget.left <= 0:
            notes.say(f"left out: {net} {name}: the time for steps is used up")
            continue
        try:
            found[name] = ready(net, name, sizes, device, notes)
        except Unavailable as error:
            left_out(f"{net} {name}", error)
        except Exception as error:
            if name == "plain":
                raise
            notes.fail(f"{net} {name}", error)
    return found


def job_rows(
    net: str, names: Sequence[str], clock: Clock, sizes: Sizes, device: str, budget: Budget, notes: Notes
) -> list[Row]:
    """A row a variant that runs here; plain first, which the ratios are to."""
    x = BUILDERS[net](sizes)[1].to(device)
    found = ready_variants(net, names, sizes, device, budget, notes)
    calls = {name: _several(each, x, sizes.steps) for name, each in found.items()}
    for call in calls.values():
        call()
    graphs = Graphs()
    seconds = clock.step_seconds(calls, rounds=sizes.rounds, warmups=sizes.warmups)
    assert graphs.compiled == 0, "nothing may be compiled while it is timed"
    kept = {name: saved_bytes(each.model, each.step, x) for name, each in found.items()}
    peak = {name: peak_bytes(each, x) for name, each in found.items()}
    return [
        {
            "net": net,
            "variant": name,
            "step_ms": round(seconds[name] / sizes.steps * 1e3, 3),
            "step_ratio": round(seconds[name] / seconds["plain"], 3),
            "saved_bytes": kept[name],
            "saved_ratio": round(kept[name] / kept["plain"], 3),
            "peak_bytes": peak[name],
            "peak_ratio": round(peak[name] / peak["plain"], 3),
            "launches": launches(each, x),
            **each.facts,
        }
        for name, each in found.items()
    ]


def _several(each: Ready, x: Tensor, steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            backward(each.model, each.step, x)

    return run


def run(clock: Clock, sizes: Sizes, device: str, budget: Budget, notes: Notes) -> Iterator[list[Row]]:
    """The rows of one job after the other."""
    for net, names in JOBS[: sizes.jobs]:
        if budget.left <= 0:
            notes.say(f"left out: {net} {', '.join(names)}: the time for steps is used up")
            continue
        try:
            yield job_rows(net, names, clock, sizes, device, budget, notes)
        except Exception as error:
            notes.fail(net, error)


__all__ = ["BUILDERS", "JOBS", "Built", "check", "resnet", "run", "transformer"]
