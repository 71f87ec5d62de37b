"""Memory of a QAT step against the plain compiled step: what is kept for backward, and the peak.

    python bench/bench_memory.py [--nets cnn,transformer] [--dtypes fp32,bf16] [--variants fxquant] [--steps 3]
                                 [--out bench/results/memory.jsonl]

A JSON line per net, dtype and variant. ``saved_bytes`` as in bench_step.py. ``peak_bytes`` is the most that torch's
allocator held at once during forward and backward beyond what it held before (gradients, which appear in the step,
included): the running sum of the allocations and frees that torch.profiler records, so it is exact and the same on
every run, where the resident set of the process depends on malloc and on what ran before. Scratch memory that oneDNN
and generated kernels take for themselves is not in it. The largest of ``--steps`` steps, after warming up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch
from bench_step import Facts, main, ready_variants, saved_bytes
from machine import environment
from torch import Tensor, nn
from variants import Step, Variant


def highest(changes: Iterable[int]) -> int:
    """The largest running sum, at least 0: ``[3, 2, -4, 1]`` → 5."""
    peak = held = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def peak_bytes(model: nn.Module, step: Step, x: Tensor) -> int:
    """Bytes of one step at its peak, beyond those at its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(x).square().mean().backward()
    model.zero_grad()
    found = profiler.profiler.kineto_results.events()  # private; tried on 2.13 and 2.15
    memory = [(event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"]
    assert memory, "the profiler records memory on CPU"
    return highest(change for _, change in sorted(memory, key=lambda event: event[0]))


def run(net: str, dtype: str, steps: int, variants: Mapping[str, Variant], failed: list[str]) -> list[Facts]:
    """Rows of one net and dtype."""
    ready, _, x = ready_variants(net, dtype, variants, failed)
    kept = {name: saved_bytes(model, step, x) for name, (model, step) in ready.items()}
    peak = {name: max(peak_bytes(model, step, x) for _ in range(steps)) for name, (model, step) in ready.items()}
    return [
        {
            "net": net,
            "dtype": dtype,
            "variant": name,
            "saved_bytes": kept[name],
            "saved_ratio": round(kept[name] / kept["plain"], 3),
            "peak_bytes": peak[name],
            "peak_ratio": round(peak[name] / peak["plain"], 3),
            "steps": steps,
            **environment(),
        }
        for name in ready
    ]


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=3))
