"""Time, saved bytes and kernels of a QAT step against the plain compiled step, interleaved in one process.

    python bench/bench_step.py [--steps 15] [--nets cnn,transformer] [--dtypes fp32,bf16] [--variants fxquant,brevitas]
                               [--processes 3] [--where] [--out bench/results/step.jsonl]

A JSON line per net, dtype (bf16 is autocast) and variant: median seconds of forward + backward, its ratio to plain,
bytes that autograd keeps for backward (parameters excluded) and their ratio, what Inductor generated (`kernels.py`),
graph breaks, and graphs that were compiled after the first step. ``--variants`` takes parts of names (`variants.py`);
peers run where they are installed (`peers.py`). What cannot run here is left out, its reason printed; a failure of
fxquant makes the exit status 1.

``--processes`` runs all of it in as many fresh processes, one after another, and gives medians over them
(`processes.py`). ``--where`` gives rows of where the time goes instead: each product, integer or float, forward and
backward, the loops and the rest, with their shares (`where.py`).

Before timing, compiled gradients of fxquant are held to those of `fxquant_eager`, and losses of the rest to the
float net's.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from kernels import watch
from machine import emit, environment
from nets import NETS, Layer, Unavailable
from processes import run_again
from table import show
from torch import Tensor, nn
from variants import DTYPES, Built, Step, Variant, autocast, chosen
from where import where

__all__ = ["NETS", "Layer", "gradients", "saved_bytes", "timed"]

# Of all gradients, relative to their norm. In bf16 eager rounds after every operator, compiled code after a kernel.
GRADIENT_ERROR = {"fp32": 2e-2, "bf16": 2e-1}
DOUBLE_ERROR = 1e-9
LAST_BIT = {"fp32": 2.0**-23, "bf16": 2.0**-8}
ROUNDING_SHARE = 2.0  # of what the batch's last bits alone do to the eager gradients
LOSS_ERROR = 0.1

Facts = dict[str, object]
Run = Callable[[str, str, int, Mapping[str, Variant], list[str]], list[Facts]]


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
    model.zero_grad()
    return sum(kept.values())


def gradients(model: nn.Module, step: Step, x: Tensor) -> list[Tensor]:
    """Gradients of one step, taken off the model again; what rounds them by chance is drawn from one seed."""
    torch.manual_seed(0)
    step(x).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def distance(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """How far the gradients of steps are off, relative to their norm, at most."""

    def off(found: list[Tensor], expected: list[Tensor]) -> float:
        pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
        return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())

    each = [off(*both) for both in zip(found, expected, strict=True)]
    return float(torch.tensor(each, dtype=torch.float64).max())  # unlike Python's, NaN where one is


def check_gradients(
    compiled: list[list[Tensor]],
    eager: list[list[Tensor]],
    dtype: str,
    doubles: Callable[[], float] | None = None,
    rounding: Callable[[], float] | None = None,
) -> float:
    """Compiled gradients equal the eager oracle's but for codes that rounding noise moved; how far off they are.

    A deep net may make too much of a moved code to tell. Those of ``doubles``, the distance in float64, decide there;
    where float64 is no graph of the same kind, ``rounding``: how far eager gradients move with the batch's last bits.
    """
    error = distance(compiled, eager)
    if error < GRADIENT_ERROR[dtype]:
        return error
    message = f"compiled gradients are off by {error:.2e}"
    assert not math.isnan(error), message
    if doubles is not None:
        exact = doubles()
        assert exact < DOUBLE_ERROR, f"{message}, in float64 by {exact:.2e}"
    elif rounding is not None:
        noise = rounding()
        assert error < ROUNDING_SHARE * noise, f"{message}, eager ones by {noise:.2e} after a change of the last bits"
    else:
        raise AssertionError(message)
    return error


def check_loss(model: nn.Module, step: Step, x: Tensor, expected: float) -> None:
    """The loss is finite and near the float net's: the variant computes the same net."""
    loss = step(x).square().mean().item()
    assert abs(loss - expected) <= LOSS_ERROR * abs(expected), f"loss is {loss:.4g}, the float net's {expected:.4g}"


def timed(variants: Mapping[str, Built], x: Tensor, steps: int) -> dict[str, float]:
    """Median seconds of forward and backward, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, (model, step) in variants.items():
            started = time.perf_counter()
            step(x).square().mean().backward()
            times[name].append(time.perf_counter() - started)
            model.zero_grad()
    return {name: statistics.median(values) for name, values in times.items()}


class Graphs:
    """Dynamo's counters since this was made."""

    def __init__(self) -> None:
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        from torch._dynamo.utils import counters

        return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]

    @property
    def breaks(self) -> int:
        """Graph breaks."""
        return self._read()[0] - self.before[0]

    @property
    def compiled(self) -> int:
        """Graphs handed to a backend."""
        return self._read()[1] - self.before[1]


def warmed(variant: Variant, model: nn.Module, x: Tensor, dtype: str) -> tuple[Built, Facts]:
    """Builds and checks a variant of a float net: its step; what was generated, Dynamo's counts and the error."""
    with torch.no_grad():
        loss = autocast(copy.deepcopy(model), dtype)(x).square().mean().item()
    trained, step = variant.build(copy.deepcopy(model), x)
    step = autocast(step, dtype)
    graphs = Graphs()
    with watch(trained, x) as made:
        found = [gradients(trained, step, x)]
        breaks, first = graphs.breaks, graphs.compiled
        found.append(gradients(trained, step, x))  # ranges are set now, maybe in another graph: the one that is timed
    counts = {"graph_breaks": breaks, "recompiles": graphs.compiled - first}
    facts: Facts = {"gradient_error": None}
    if variant.ours:

        def taken(model: nn.Module, x: Tensor, dtype: str, backend: str) -> list[list[Tensor]]:
            built, step = variant.build(copy.deepcopy(model), x, backend=backend)
            return [gradients(built, autocast(step, dtype), x) for _ in found]

        eager = taken(model, x, dtype, "fxquant_eager")

        def in_doubles() -> float:
            wide, wide_x = copy.deepcopy(model).double(), x.double()
            return distance(*(taken(wide, wide_x, dtype, backend) for backend in ("fxquant", "fxquant_eager")))

        def rounding() -> float:
            signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            return distance(taken(model, x * (1 + signs.to(x) * LAST_BIT[dtype]), dtype, "fxquant_eager"), eager)

        doubles = in_doubles if dtype == "fp32" and variant.same_in_doubles else None
        error = check_gradients(found, eager, dtype, doubles, rounding)
        facts["gradient_error"] = float(f"{error:.1e}")
    check_loss(trained, step, x, loss)
    return (trained, step), {**made.fields(), **counts, **facts}


def still_compiling(variants: Mapping[str, Built], x: Tensor, steps: int = 4) -> list[str]:
    """Steps in turn until none compiles anything, as some peers do in their second and third; those that still do."""
    names = list(variants)
    for _ in range(steps):
        names = [name for name in variants if _compiles(variants[name], x)]
        if not names:
            break
    return names


def _compiles(built: Built, x: Tensor) -> bool:
    graphs = Graphs()
    try:
        timed({"": built}, x, 1)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return True
    return graphs.compiled > 0


def ready_variants(
    net: str, dtype: str, variants: Mapping[str, Variant], failed: list[str]
) -> tuple[dict[str, Built], dict[str, Facts], Tensor]:
    """The variants of a net that run here, warm, with what is known of them, and the batch.

    Names of fxquant's that do not run go to ``failed``; the reason of each that does not is printed.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = NETS[net]()
    ready: dict[str, Built] = {}
    facts: dict[str, Facts] = {}
    for name, variant in variants.items():
        try:
            ready[name], facts[name] = warmed(variant, model, x, dtype)
        except Exception as error:
            leave_out(f"{net} {dtype}", name, variant, error, failed)
    return ready, facts, x


def run(net: str, dtype: str, steps: int, variants: Mapping[str, Variant], failed: list[str]) -> list[Facts]:
    """Rows of one net and dtype."""
    ready, facts, x = ready_variants(net, dtype, variants, failed)
    for name in still_compiling(ready, x):
        del ready[name]
        leave_out(f"{net} {dtype}", name, variants[name], RuntimeError("it compiles in every step"), failed)
    graphs = Graphs()
    seconds = timed(ready, x, steps)
    assert graphs.compiled == 0, "nothing may be compiled while it is timed"
    kept = {name: saved_bytes(each, step, x) for name, (each, step) in ready.items()}
    return [
        {
            "net": net,
            "dtype": dtype,
            "variant": name,
            "step_seconds": round(seconds[name], 5),
            "step_ratio": round(seconds[name] / seconds["plain"], 3),
            "saved_bytes": kept[name],
            "saved_ratio": round(kept[name] / kept["plain"], 3),
            **facts[name],
            "steps": steps,
            **environment(),
        }
        for name in ready
    ]


def run_where(net: str, dtype: str, steps: int, variants: Mapping[str, Variant], failed: list[str]) -> list[Facts]:
    """Rows of where a step's time goes, of one net and dtype."""
    ready, _, x = ready_variants(net, dtype, variants, failed)
    still_compiling(ready, x)
    return [
        {"net": net, "dtype": dtype, "variant": name, **each, "steps": steps, **environment()}
        for name, built in ready.items()
        for each in where(built, x, steps)
    ]


class NoBaseline(Exception):
    """The plain compiled step does not run, or is wrong: nothing to compare others of this net and dtype with."""


def leave_out(where: str, name: str, variant: Variant, error: Exception, failed: list[str]) -> None:
    """Says why a variant has no row, and notes a failure of ours; raises NoBaseline for the plain one."""
    if name == "plain":
        raise NoBaseline(f"the plain compiled step fails: {type(error).__name__}: {error}") from error
    if variant.ours and not isinstance(error, Unavailable):
        failed.append(f"{where} {name}")
    left_out(f"{where} {name}", error)


def left_out(what: str, error: Exception) -> None:
    """Says why a row is missing, in one line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, (Unavailable, NoBaseline)) else f"{type(error).__name__}: "
    print(f"left out: {what}: {kind}{text[:300]}", file=sys.stderr, flush=True)


def arguments(description: str | None, steps: int) -> argparse.ArgumentParser:
    """What the step and memory benches have in common on the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--variants", default="", help="comma-separated parts of names; default all")
    parser.add_argument("--processes", type=int, default=1, help="medians over as many fresh processes; default 1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    return parser


def asked(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[list[tuple[str, str]], dict[str, Variant]]:
    """The (net, dtype) pairs and variants of a command line; ends with its message where a name is unknown."""
    for flag, known in (("nets", NETS), ("dtypes", DTYPES)):
        unknown = [name for name in getattr(options, flag).split(",") if name not in known]
        if unknown:
            parser.error(f"--{flag} must be among {', '.join(known)}: got {', '.join(unknown)}.")
    for flag in ("steps", "processes"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} must be at least 1: got {getattr(options, flag)}.")
    try:
        variants = chosen(options.variants)
    except ValueError as error:
        parser.error(str(error))
    return [(net, dtype) for net in options.nets.split(",") for dtype in options.dtypes.split(",")], variants


def main(run: Run, description: str | None, steps: int, instead: Run | None = None) -> int:
    """The command line of a bench that makes rows by net, dtype and variant, or ``instead``; its exit status."""
    parser = arguments(description, steps)
    if instead is not None:
        parser.add_argument("--where", action="store_true", help="rows of where the time goes")
    options = parser.parse_args()
    if instead is not None and options.where:
        run = instead
    pairs, variants = asked(options, parser)
    if options.processes > 1:
        found, status = run_again(options.processes, sys.argv[1:])
        emit(found, options.out)
        show(found)
        return status
    rows: list[Facts] = []
    failed: list[str] = []
    # Variants of a net share its code object; a limit that is reached would leave the last of them eager.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for net, dtype in pairs:
            try:
                found = run(net, dtype, options.steps, variants, failed)
            except (Unavailable, NoBaseline) as error:
                left_out(f"{net} {dtype}", error)
                if isinstance(error, NoBaseline):
                    failed.append(f"{net} {dtype} plain")
                continue
            emit(found, options.out)
            rows += found
    show(rows)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=15, instead=run_where))
