"""`measure_costs`: what layers cost in a runtime of this machine, in the middle of a net."""

from __future__ import annotations

import datetime
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fxquant.errors import InvalidArgument
from fxquant.onnx.costing.files import INTEGER, PLAIN, Made, addition, convolutions, product
from fxquant.onnx.costing.grid import ADDS, Conv, Product
from fxquant.onnx.costing.grid import convolutions as all_convolutions
from fxquant.onnx.costing.grid import products as all_products
from fxquant.onnx.tuning.files import write
from fxquant.onnx.write import move_into_place
from fxquant.support.progress import counting
from fxquant.support.require import require
from fxquant.targets.costs import EDGES, Cost, CostTable, Line, Row, Size, cpu_class
from fxquant.targets.cpu import cpu_name
from fxquant.targets.document import Feeds, ModelPath
from fxquant.targets.registry import TARGETS, get_target
from fxquant.targets.target import Samples

Times = dict[str, float]
Clock = Callable[[Mapping[str, Made]], Times]
"""Files → medians in microseconds."""

_LEAST = 0.05  # of what was measured, where a difference of two times comes out lower: the noise of small layers


def measure_costs(
    target: str = "onnxruntime",
    *,
    convs: Sequence[Conv] | None = None,
    products: Sequence[Product] | None = None,
    adds: Sequence[int] = ADDS,
    rounds: int = 15,
    threads: int = 1,
    progress: bool = True,
) -> CostTable:
    """Times layers of usual sizes in a runtime of this machine, as integers and in float: a table for ``skip_slow``.

    A convolution stands in a row of its like, ``t(two) − t(one)``, so that what its ends cost (codes, another order of
    the channels) is not counted; that is measured apart, from rows that change their form midway. Products run alone.

    Args:
        target: a runtime whose integer convolutions give codes. OpenVINO's give floats or codes, as the next operator
            wants them, and no layer of the nets measured there was faster in float.
        convs, products, adds: what is measured; by default the grids of `fxquant.onnx.costing.grid`, in half a minute.
        rounds: runs of each file, interleaved, of which the medians count.
        threads: of the runtime.

    Raises:
        InvalidArgument: another target; numbers out of range; nothing to measure.
        ExportError: the runtime does not load a file. MissingDependency: the runtime is not installed.
    """
    samples, version = _runtime(target)
    for name, value, least in (("rounds", rounds, 3), ("threads", threads, 1)):
        if value < least:
            raise InvalidArgument(f"{name} must be at least {least}: got {value}.")
    convs = list(all_convolutions()) if convs is None else convs
    products = list(all_products()) if products is None else products
    if not any(conv.is_chained for conv in convs) or not products:
        raise InvalidArgument(
            "convs must name a layer of stride 1 that another can follow, and products one: got none to measure."
        )
    clock = functools.partial(_medians, samples, rounds, threads)
    with counting("costs", show=progress) as step:
        rows, edges = _measure(convs, products, adds, clock, step)
    where = {"cpu": cpu_class(), "machine": cpu_name(), "date": datetime.date.today().isoformat()}
    return CostTable(target=target, version=version, threads=threads, rows=tuple(rows), edges=edges, **where)


def save_costs(table: CostTable, path: Path) -> None:
    """Writes a table: whole, or what was there stays."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".fxquant-") as folder:
        (Path(folder) / path.name).write_text(table.to_json())
        move_into_place(Path(folder), path)


def _medians(samples: Samples, rounds: int, threads: int, cases: Mapping[str, Made]) -> Times:
    with tempfile.TemporaryDirectory(prefix="fxquant-") as folder:
        written = {name: _written(Path(folder) / f"{name}.onnx", made) for name, made in cases.items()}
        found = samples(written, rounds=rounds, threads=threads)
    return {name: statistics.median(seconds) * 1e6 for name, seconds in found.items()}


def _runtime(target: str) -> tuple[Samples, str]:
    """How its files are timed, and its version."""
    found = get_target(target)
    if found.runtime is None or found.runtime.samples is None or "conv" not in found.profile.needs_output:
        measured = ", ".join(
            repr(name)
            for name, each in TARGETS.items()
            if each.runtime and each.runtime.samples and "conv" in each.profile.needs_output
        )
        raise InvalidArgument(f"target must be one whose costs are measured, {measured}: got {target!r}.")
    require("onnx")
    return found.runtime.samples, str(found.runtime.require().__version__).partition("-")[0]


def _written(path: Path, made: Made) -> tuple[ModelPath, Feeds]:
    model, feeds = made
    write(model, path)
    return path, feeds


def _measure(
    convs: Sequence[Conv],
    products: Sequence[Product],
    adds: Sequence[int],
    clock: Clock,
    step: Callable[[str], None],
) -> tuple[list[Row], dict[str, dict[str, Line]]]:
    count, rows, changes = len(convs) + len(products), list[Row](), dict[str, list[tuple[int, float]]]()
    chained = [conv for conv in convs if conv.is_chained]
    for number, conv in enumerate(chained):
        step(f"{conv.size}, {number + 1} of {count}")
        cost, found = _in_a_row(conv, clock)
        rows.append(Row(size=conv.size, cost=cost))
        for name, pair in found.items():
            changes.setdefault(name, []).append(pair)
    ends = {name: _line(pairs) for name, pairs in changes.items()}
    edges = {"conv": {name: ends[name] for name in EDGES}}
    others = [conv for conv in convs if not conv.is_chained]
    for number, conv in enumerate(others):
        step(f"{conv.size}, {len(chained) + number + 1} of {count}")
        rows.append(Row(size=conv.size, cost=(_first if conv.is_first else _after_another)(conv, ends, clock)))
    entering = []
    for number, each in enumerate(products):
        step(f"{each.size}, {len(convs) + number + 1} of {count}")
        cases = {form: product(each, form) for form in (INTEGER, PLAIN)} | {
            "enter": product(each, INTEGER, enters=True)
        }
        times = clock(cases)
        rows.append(Row(size=each.size, cost=Cost(integer=times[INTEGER], plain=times[PLAIN])))
        numbers = each.rows * each.depth * max(1, each.batches)
        entering.append((numbers, times["enter"] - times[INTEGER]))
    nothing = Line(fixed=0.0, each=0.0)
    entry = _line(entering)
    edges["product"] = dict(enter=entry, leave=nothing, reorder=nothing, to_integer=entry, to_float=nothing)
    for elements in adds:
        times = clock({form: addition(elements, form) for form in (INTEGER, PLAIN)})
        rows.append(Row(size=Size(op="add", rows=elements), cost=Cost(integer=times[INTEGER], plain=times[PLAIN])))
    return rows, edges


def _in_a_row(conv: Conv, clock: Clock) -> tuple[Cost, dict[str, tuple[int, float]]]:
    """The layer's cost in a row; the changes of form, each with how many numbers changed and its microseconds.

    A row of ``n`` layers takes ``n · layer + ends``. Where inputs and outputs differ in number, the row goes there and
    back, and a layer is half of that. ``codes`` and ``floats`` are the two ends of a row of integers and of floats,
    where the picture changes its layout.
    """
    unit = [conv] if conv.inputs == conv.outputs else [conv, conv.turned]
    rows = {INTEGER: [(each, INTEGER) for each in unit], PLAIN: [(each, PLAIN) for each in unit]}
    cases = {
        "i": convolutions(rows[INTEGER]),
        "ii": convolutions(rows[INTEGER] * 2),
        "f": convolutions(rows[PLAIN]),
        "ff": convolutions(rows[PLAIN] * 2),
        "fi": convolutions(rows[PLAIN] + rows[INTEGER]),
        "if": convolutions(rows[INTEGER] + rows[PLAIN]),
        "enter": convolutions(rows[INTEGER], enters=True),
        "leave": convolutions(rows[INTEGER], leaves=True),
    }
    t = clock(cases)
    integer, plain = (max(t[2 * form] - t[form], _LEAST * t[form]) for form in (INTEGER, PLAIN))
    codes, floats = max(0.0, t["i"] - integer), max(0.0, t["f"] - plain)
    ends = (codes + floats) / 2
    numbers = conv.inputs * conv.pixels**2
    changes = {
        "enter": t["enter"] - t["i"] + codes / 2,
        "leave": t["leave"] - t["i"] + codes / 2,
        "reorder": floats / 2,
        "codes": codes / 2,
        "to_integer": t["fi"] - integer - plain - ends,
        "to_float": t["if"] - integer - plain - ends,
    }
    cost = Cost(integer=integer / len(unit), plain=plain / len(unit))
    return cost, {name: (numbers, max(0.0, value)) for name, value in changes.items()}


def _after_another(conv: Conv, ends: Mapping[str, Line], clock: Clock) -> Cost:
    """A layer that shrinks its picture, after one that does not: less what the first costs, and its larger end."""
    before, read, made = conv.before, conv.inputs * conv.pixels**2, conv.outputs * conv.side**2
    t = clock(
        {
            "i": convolutions([(before, INTEGER)]),
            "ii": convolutions([(before, INTEGER), (conv, INTEGER)]),
            "f": convolutions([(before, PLAIN)]),
            "ff": convolutions([(before, PLAIN), (conv, PLAIN)]),
        }
    )
    integer = t["ii"] - t["i"] + ends["codes"].at(read) - ends["codes"].at(made)
    plain = t["ff"] - t["f"] + ends["reorder"].at(read) - ends["reorder"].at(made)
    return Cost(integer=max(integer, _LEAST * t["ii"]), plain=max(plain, _LEAST * t["ff"]))


def _first(conv: Conv, ends: Mapping[str, Line], clock: Clock) -> Cost:
    """A layer of few channels, which no other is before: from and to floats, less what its ends cost."""
    cases = {INTEGER: convolutions([(conv, INTEGER)], enters=True, leaves=True), PLAIN: convolutions([(conv, PLAIN)])}
    t, read, made = clock(cases), conv.inputs * conv.pixels**2, conv.outputs * conv.side**2
    integer = t[INTEGER] - ends["enter"].at(read) - ends["leave"].at(made)
    plain = t[PLAIN] - ends["reorder"].at(made)
    return Cost(integer=max(integer, _LEAST * t[INTEGER]), plain=max(plain, _LEAST * t[PLAIN]))


def _line(pairs: Sequence[tuple[int, float]]) -> Line:
    """Through medians, since a difference of times has outliers.

    Of the time for each number where numbers are many; then of what that leaves over where they are few.
    """
    ordered = sorted(pairs)
    half, third = len(ordered) // 2, max(1, len(ordered) // 3)
    each = statistics.median(time / numbers for numbers, time in ordered[half:])
    fixed = statistics.median(time - each * numbers for numbers, time in ordered[:third])
    return Line(fixed=max(0.0, fixed), each=max(0.0, each * 1000))
