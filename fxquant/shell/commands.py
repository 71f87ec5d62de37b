"""What each command does: a function of what was given, which writes to its ``out`` and returns the exit status."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.shell.called_as import called_as


def doctor(given: argparse.Namespace) -> int:
    """`fxquant.shell.doctor`."""
    from fxquant.shell.doctor import examine

    return examine(given.out, quick=given.quick, as_json=given.json)


def explain(given: argparse.Namespace) -> int:
    """`fxquant.report.explain` of a prepared model, drawn where asked."""
    from fxquant.shell.models import prepared

    model, args = prepared(given)
    found = fxquant.explain(model, args)
    if given.draw:
        found.draw(given.draw)
    return _print(found, found.to_dict(), given)


def cost(given: argparse.Namespace) -> int:
    """`fxquant.cost` of a prepared model."""
    from fxquant.shell.models import prepared

    model, args = prepared(given)
    found = fxquant.cost(model, args, dynamic_batch=given.dynamic_batch)
    return _print(found, found.to_dict(), given)


def passes(given: argparse.Namespace) -> int:
    """The graphs between passes, of a compile or an export."""
    from fxquant.report.between_passes import steps
    from fxquant.shell.models import prepared

    model, args = prepared(given)
    if given.export:
        fxquant.calibrate(model, [args], progress=False)
    found = steps(model, args, export=given.export, until=given.until)
    return _print("\n".join(map(str, found)), [step.to_dict() for step in found], given)


def lint(given: argparse.Namespace) -> int:
    """A file against a target's rules; 1 where it breaks one."""
    from fxquant.onnx import lint_onnx

    report = lint_onnx(given.path, given.target)
    _print(report, report.to_dict(), given)
    return 0 if report else 1


def kernels(given: argparse.Namespace) -> int:
    """The kernel of each product of a file."""
    from fxquant.support.table import table
    from fxquant.targets.document import load_model
    from fxquant.targets.registry import configured, get_target

    target = get_target(given.target)
    runtime = configured(target, capability=given.capability, timeout=given.timeout)
    if runtime is None:
        raise InvalidArgument(
            f"target must be one that runs here: got {target.name!r}, which has rules alone. Check those: "
            f"{called_as()} lint {given.path} --target {target.name}"
        )
    runtime.require()
    load_model(given.path)  # which says in a line what is no model
    rows = runtime.kernels(given.path)
    cells = [(r.name, r.op_type, r.kernel, "yes" if r.integer else "no", r.reason or "") for r in rows]
    return _print(table(("node", "op", "kernel", "integer", "why not"), cells), [vars(row) for row in rows], given)


def tune(given: argparse.Namespace) -> int:
    """`fxquant.tune_onnx`."""
    found = fxquant.tune_onnx(
        given.path,
        target=given.target,
        shapes=dict(map(_sizes, given.shape)),
        threads=given.threads,
        rounds=given.rounds,
        output=given.output,
    )
    return _print(found, found.to_dict(), given)


def costs(given: argparse.Namespace) -> int:
    """The table of `fxquant.onnx.costing`, into a file."""
    from fxquant.onnx.costing import measure_costs, save_costs
    from fxquant.onnx.export import check_path

    path = check_path(given.output)
    if path.suffix != ".json":
        raise InvalidArgument(f"--output must end in .json, by which prepare knows a table: got {given.output!r}.")
    table = measure_costs(given.target, rounds=given.rounds, threads=given.threads)
    save_costs(table, path)
    slow = sum(row.cost.plain < row.cost.integer for row in table.rows)
    given.out.write(f"{path}: {len(table.rows)} layers in {table}; {slow} of them are faster in float\n")
    given.out.write(f"use it as fxquant.prepare(model, args, target={given.target!r}, skip_slow={given.output!r})\n")
    return 0


def completion(given: argparse.Namespace) -> int:
    """The script of a shell."""
    from fxquant.shell.completion import script

    given.out.write(script(given.shell, given.tree))
    return 0


def _print(text: object, plain: Any, given: argparse.Namespace) -> int:
    given.out.write(f"{json.dumps(plain, indent=2) if given.json else text}\n")
    return 0


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    """``x=1x3x224x224`` as a name and sizes."""
    name, _, shape = text.rpartition("=")
    if not name or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise InvalidArgument(f"--shape must be NAME=SHAPE: got {text!r}. Write x=1x3x224x224.")
    return name, tuple(map(int, shape.split("x")))
