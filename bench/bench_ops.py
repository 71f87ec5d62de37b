"""Each compiled operator against a compiled copy of the same tensor, and against torch's own kernel.

    python bench/bench_ops.py [--megabytes 1,4,64,1024] [--rounds 15] [--ops per_tensor] [--out FILE]

An operator that fuses well reads its input once and writes its output once, as a copy does: ``share`` is the time of
the compiled ``clone`` over that of the compiled operator, 1.0 the best there is. ``times_torch`` says how many times
faster it is than torch's operator, compiled and eager, where there is one. Median of interleaved rounds; before they
are timed, compiled results are held to eager ones, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import emit, environment
from torch import Tensor

from fxquant import ops, tensor_quant

Call = Callable[..., Tensor]
COLUMNS = 1024
SCALE, POINT = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)
AMAX = torch.tensor(3.0)


@dataclass(frozen=True)
class Op:
    """An operator with its parameters, and torch's counterpart if there is one."""

    name: str
    ours: Call
    torchs: Call | None = None
    parameters: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: ()


def channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """A scale and zero point for each row."""
    return torch.linspace(0.01, 0.1, x.shape[0]), torch.zeros(x.shape[0], dtype=torch.int32)


OPS = (
    Op(
        "per_tensor",
        lambda x: ops.fake_quantize_per_tensor_affine(x, SCALE, POINT, -128, 127),
        lambda x: torch.fake_quantize_per_tensor_affine(x, SCALE, POINT, -128, 127),
    ),
    Op(
        "per_tensor divide",
        lambda x: ops.fake_quantize_per_tensor_affine(x, SCALE, POINT, -128, 127, rounding="divide"),
    ),
    Op(
        "per_channel",
        lambda x, s, z: ops.fake_quantize_per_channel_affine(x, s, z, 0, -128, 127),
        lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 0, -128, 127),
        parameters=channels,
    ),
    Op(
        "per_channel divide",
        lambda x, s, z: ops.fake_quantize_per_channel_affine(x, s, z, 0, -128, 127, rounding="divide"),
        parameters=channels,
    ),
    Op("tensor_quant int8", lambda x: tensor_quant.fake_tensor_quant(x, AMAX)),
    Op("e4m3", lambda x: tensor_quant.scaled_e4m3(x, AMAX, 4, 3)),
    Op("block int4", lambda x: ops.fake_quantize_blocks(x, {-1: 32}, 4)),
    Op("mx e4m3", lambda x: ops.fake_quantize_mx(x, {-1: 32}, "e4m3")),
    Op("mx e2m1", lambda x: ops.fake_quantize_mx(x, {-1: 32}, "e2m1")),
    Op("nvfp4", lambda x: ops.fake_quantize_nvfp4(x, AMAX, {-1: 16})),
)


def medians(calls: dict[str, Call], x: Tensor, parameters: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """Seconds per call, the calls taking turns; small tensors are timed several calls at a time."""
    repeat = max(1, 2**22 // x.numel())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeat):
                call(x, *parameters)
            times[name].append((time.perf_counter() - started) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def check(op: Op, compiled: Call, x: Tensor) -> None:
    """The compiled operator gives eager's bits."""
    parameters = op.parameters(x)
    got, expected = compiled(x, *parameters), op.ours(x, *parameters)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), f"{op.name}: compiled differs from eager"


def rows(op: Op, megabytes: list[int], rounds: int) -> list[dict[str, object]]:
    """One row a size."""
    torch._dynamo.reset()
    compile_ = torch.compile
    calls: dict[str, Call] = {"clone": compile_(lambda x, *_: x.clone()), "ours": compile_(op.ours)}
    if op.torchs is not None:
        calls |= {"torch compiled": compile_(op.torchs), "torch eager": op.torchs}
    found = []
    for size in megabytes:
        x = torch.randn(size * 2**18 // COLUMNS, COLUMNS)
        check(op, calls["ours"], x[: 2**18 // COLUMNS])
        torch._dynamo.reset()  # a compile a size: what is measured is not the dynamic-shape kernel
        parameters = op.parameters(x)
        for call in calls.values():
            call(x, *parameters)
        seconds = medians(calls, x, parameters, rounds)
        found.append(
            {
                "op": op.name,
                "megabytes": size,
                "gigabytes_per_second": round(2 * x.nbytes / seconds["ours"] / 1e9, 2),
                "share": round(seconds["clone"] / seconds["ours"], 3),
                "times_torch": {
                    name.split()[1]: round(s / seconds["ours"], 2) for name, s in seconds.items() if name[:5] == "torch"
                },
                "rounds": rounds,
                **environment(),
            }
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="1,4,64,1024")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ops", default="", help="names to run, separated by commas; all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wanted = [name.strip() for name in options.ops.split(",") if name.strip()]
    unknown = sorted(set(wanted) - {op.name for op in OPS})
    if unknown:
        parser.error(f"--ops must be among {', '.join(op.name for op in OPS)}: got {', '.join(unknown)}")
    sizes = [int(size) for size in options.megabytes.split(",")]
    with torch.no_grad():
        for op in OPS:
            if not wanted or op.name in wanted:
                emit(rows(op, sizes, options.rounds), options.out)


if __name__ == "__main__":
    main()
