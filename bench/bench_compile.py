"""Compile time of a QAT step against the plain compiled step, cold and through Inductor's caches.

    python bench/bench_compile.py [--nets cnn,transformer] [--variants plain,fxquant] [--out FILE]

A JSON line per net and variant. Each variant compiles forward and backward of one step in a process of its own with
an empty cache (``cold_seconds``), and then in a second process with the cache that the first has left
(``warm_seconds``). Seconds run from the first call to the end of the first backward, so imports and `fxquant.prepare`
are outside. ``ratio`` compares with the plain step's cold seconds, ``own_share`` is the part of the cold seconds in
fxquant's capture and passes, ``hits`` and ``misses`` are those of the second process: of AOTAutograd's cache first,
then of Inductor's, which is asked where the first missed or for what it holds. ``cpu_seconds`` counts all processes
and threads, and depends less on what else the machine does.

A row is printed only where the gradients of the second process equal those of the first bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import emit, environment
from nets import Block, Layer
from torch import Tensor, nn

NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *(Block(16) for _ in range(3))),
        torch.randn(4, 3, 16, 16),
    ),
    "transformer": lambda: (nn.Sequential(*(Layer(64) for _ in range(3))), torch.randn(2, 16, 64)),
}
VARIANTS = ("plain", "fxquant")


def digest(model: nn.Module) -> str:
    """The bits of all gradients."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        assert parameter.grad is not None, "every parameter of these nets takes part"
        found.update(parameter.grad.contiguous().numpy().tobytes())
    return found.hexdigest()


def warm_up() -> None:
    """Loads the compiler, and finds out what it asks the machine once, with a net that shares no code with others."""
    torch.compile(nn.Linear(2, 2))(torch.randn(1, 2)).sum().backward()
    torch._dynamo.reset()


def compile_once(net: str, variant: str) -> dict[str, object]:
    """One forward and backward, compiled in this process."""
    import fxquant
    from fxquant.backend.reports import compile_reports

    torch.manual_seed(0)
    model, x = NETS[net]()
    if variant == "fxquant":
        fxquant.prepare(model, (x,))
    warm_up()
    counters = torch._dynamo.utils.counters
    counters.clear()
    before, cpu, started = len(compile_reports()), os.times(), time.perf_counter()
    step = torch.compile(model, backend="fxquant" if variant == "fxquant" else "inductor")
    step(x).square().mean().backward()
    seconds, after = time.perf_counter() - started, os.times()
    autograd, graphs = counters["aot_autograd"], counters["inductor"]
    return {
        "seconds": seconds,
        "cpu_seconds": sum(after[:4]) - sum(cpu[:4]),
        "own_seconds": sum(report.seconds for report in compile_reports()[before:]),
        "hits": [autograd["autograd_cache_hit"], graphs["fxgraph_cache_hit"]],
        "misses": [autograd["autograd_cache_miss"], graphs["fxgraph_cache_miss"]],
        "gradients": digest(model),
    }


def in_process(net: str, variant: str, cache: str) -> dict[str, object]:
    """`compile_once` in a process of its own with the caches in a folder of their own."""
    command = [sys.executable, __file__, "--child", net, variant]
    done = subprocess.run(
        command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{net}, {variant}: the compiling process failed.\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(net: str, variant: str, plain_seconds: float | None) -> dict[str, object]:
    """The row of one net and variant."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (in_process(net, variant, cache) for _ in range(2))
    assert cold["gradients"] == warm["gradients"], f"{net}, {variant}: cached code gave other gradients"
    seconds, again = float(str(cold["seconds"])), float(str(warm["seconds"]))
    return {
        "net": net,
        "variant": variant,
        "cold_seconds": round(seconds, 2),
        "cold_cpu_seconds": round(float(str(cold["cpu_seconds"])), 2),
        "ratio": round(seconds / plain_seconds, 2) if plain_seconds else None,
        "own_share": round(float(str(cold["own_seconds"])) / seconds, 3),
        "warm_seconds": round(again, 2),
        "speed_up": round(seconds / again, 1),
        "hits": warm["hits"],
        "misses": warm["misses"],
        **environment(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NET", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compile_once(*options.child)))
        return
    for net in options.nets.split(","):
        plain: float | None = None
        for variant in options.variants.split(","):
            row = run(net, variant, plain)
            if variant == "plain":
                plain, row["ratio"] = float(str(row["cold_seconds"])), 1.0
            emit([row], options.out)


if __name__ == "__main__":
    main()
