"""The card's copy bandwidth, each operator's share of it, and whole QAT steps against plain: one call, 9 minutes.

    python bench/gpu/bench_gpu.py [--seconds 450] [--phases kernels,steps] [--out bench/results/gpu.jsonl]
    python bench/gpu/bench_gpu.py --device cpu --tiny         every line of it, on tiny sizes, in a minute or two

Phases: check (compiled gradients against eager ones: where they are off no step is timed), kernels (`pointwise.py`, the
copy first; what differs from eager in a bit is not timed), steps (`steps.py`). Nothing new is begun when ``--seconds``
have passed, and operators have a third of them; what does not fit is left out and said. A JSON line is printed, and
appended to ``--out``, as soon as it is known, so that a run that is cut off keeps all it had measured. Last comes a
short table: each figure, what is wanted of it, whether it is reached. The exit status is 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import pointwise  # noqa: E402
import steps  # noqa: E402
import torch  # noqa: E402
from clock import Budget, Clock, Notes  # noqa: E402
from machine import emit, environment  # noqa: E402
from sizes import CARD, CHECKED, TINY, Sizes  # noqa: E402
from table import plain  # noqa: E402

Row = dict[str, object]
PHASES = ("check", "kernels", "steps")
# The part of what is left that operators may take.
KERNELS = 0.35


@dataclass(frozen=True)
class Wanted:
    """A figure that must hold: its name, and the least or the most that it may be."""

    name: str
    least: float | None = None
    most: float | None = None

    def reached(self, value: float) -> bool:
        """Whether a value is as good as wanted."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f">= {self.least:.2f}" if self.least is not None else f"<= {self.most:.2f}"


SHARE = Wanted("share of copy bandwidth", least=0.90)
STEP = Wanted("step time, plain = 1", most=1.05)
PEAK = Wanted("peak memory, plain = 1", most=0.90)
INTEGER = Wanted("step time with integer products, plain = 1", most=1.0)


def verdicts(rows: Sequence[Mapping[str, object]]) -> list[Row]:
    """What is wanted, beside what was measured."""
    found: list[Row] = []

    def add(what: str, wanted: Wanted, value: object) -> None:
        if isinstance(value, float):
            reached = "pass" if wanted.reached(value) else "FAIL"
            found.append({"figure": f"{what}: {wanted.name}", "is": value, "wanted": str(wanted), "": reached})

    asked = {op.name for op in pointwise.OPS if op.wanted}
    for row in rows:
        if row.get("op") in asked and row["way"] in ("triton", "cuda"):
            add(f"{row['op']}, {row['way']}", SHARE, row["share"])
        elif row.get("variant") == "fxquant int8":
            add(f"{row['net']}", STEP, row["step_ratio"])
            add(f"{row['net']}", PEAK, row["peak_ratio"])
        elif row.get("variant") == "fxquant integer matmul":
            add(f"{row['net']}", INTEGER, row["step_ratio"])
    return found


def measured(phases: Sequence[str], sizes: Sizes, device: str, budget: Budget, notes: Notes) -> Iterator[list[Row]]:
    """All rows, in lists as they are known."""
    clock = Clock(device)
    if "check" in phases:
        for row in steps.check(device, TINY if sizes is TINY else CHECKED, sizes.checked, notes):
            yield [row]
    if "kernels" in phases:
        rate = pointwise.copy_rate(clock, sizes, device)
        yield [{"bandwidth": "copy", "megabytes": sizes.megabytes, "gigabytes_per_second": round(rate / 1e9, 1)}]
        yield from pointwise.run(clock, sizes, rate, device, budget.part(KERNELS), notes)
    checks = [name for name in notes.failed if name.startswith("check")]
    if "steps" in phases and checks:
        notes.say(f"left out: steps: their gradients may be wrong ({', '.join(checks)})")
    elif "steps" in phases:
        yield from steps.run(clock, sizes, device, budget, notes)


def device_facts(device: str) -> Row:
    """What stands in every row."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {**environment(), "device": name, "cuda": torch.version.cuda}


def ensure_backend() -> None:
    """A checkout that is not installed has no entry points: names the backends by hand."""
    import fxquant

    if "fxquant" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(fxquant.backend.fxquant, name="fxquant")
        torch._dynamo.register_backend(fxquant.backend.fxquant_eager, name="fxquant_eager")


def show(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """A short table of some columns, where there are rows."""
    if rows:
        print(plain(columns, rows), end="\n\n")


def summary(rows: Sequence[Mapping[str, object]]) -> None:
    """The short tables at the end."""
    kernels = [row for row in rows if "op" in row]
    show(kernels, ["op", "way", "microseconds", "share", "differing"])
    shown = ["net", "variant", "step_ms", "step_ratio", "saved_ratio", "peak_ratio", "launches", "kernels"]
    show([row for row in rows if "variant" in row], shown)
    show(verdicts(rows), ["figure", "is", "wanted", ""])


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends with its message where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes with which nothing is measured, but every line runs")
    parser.add_argument("--seconds", type=float, default=450.0, help="after which nothing new is begun; default 450")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    options = parser.parse_args(given)
    options.phases = options.phases.split(",")
    unknown = sorted(set(options.phases) - set(PHASES))
    if unknown:
        parser.error(f"--phases must be among {', '.join(PHASES)}: got {', '.join(unknown)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda must find a CUDA device: torch finds none. Take --device cpu --tiny to try it out.")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """The command line; 1 where a result was wrong or something of ours failed."""
    options = arguments(given)
    ensure_backend()
    facts = device_facts(options.device)
    budget, notes = Budget(options.seconds), Notes()
    rows: list[Row] = []
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for found in measured(options.phases, TINY if options.tiny else CARD, options.device, budget, notes):
            emit([{**row, **facts} for row in found], options.out)
            rows += found
            notes.say(f"{options.seconds - budget.left:.0f} s")
    summary(rows)
    wrong = [f"{row['op']} {row['way']}" for row in rows if row.get("differing")]
    if wrong:
        notes.say(f"wrong, and not timed: {', '.join(wrong)}")
    if notes.failed:
        notes.say(f"failed: {', '.join(notes.failed)}")
    return 1 if wrong or notes.failed else 0


if __name__ == "__main__":
    sys.exit(main())
