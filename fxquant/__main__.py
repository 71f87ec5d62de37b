"""``python -m fxquant``: what a shell can do with a model or a file. Exit status 0 is good, 1 is not, 2 is usage."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import fxquant

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def main(argv: list[str] | None = None) -> int:
    """Dispatches to a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fxquant", description="Quantization-aware training for ONNX.")
    parser.add_argument("--version", action="version", version=f"fxquant {fxquant.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "demo", help="train, quantize, export and verify two nets on handwritten digits", add_help=False
    )
    _add_kernels(commands)
    _add_tune(commands)
    _add_costs(commands)
    lint = commands.add_parser("lint", help="check an ONNX file against a target's rules; 1 where it breaks one")
    lint.add_argument("path", help="an ONNX file")
    lint.add_argument("--target", default="onnxruntime", help="the runtime it is for (default: onnxruntime)")
    lint.add_argument("--json", action="store_true", help="print JSON")
    lint.set_defaults(run=_lint)
    _add_explain(commands)
    _add_cost(commands)
    _add_passes(commands)
    known, rest = parser.parse_known_args(argv)
    if known.command == "demo":
        from fxquant.demo import main as demo

        return demo(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace], int] = known.run
    try:
        return run(known)
    except fxquant.errors.FxquantError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _add_kernels(commands: Any) -> None:
    kernels = commands.add_parser("kernels", help="which nodes of an ONNX file its runtime runs on integers")
    kernels.add_argument("path", help="an ONNX file")
    kernels.add_argument("--target", default="onnxruntime", help="the runtime it is for (default: onnxruntime)")
    kernels.add_argument("--capability", help="compute capability to build for, such as 8.9; tensorrt alone")
    kernels.add_argument("--timeout", type=float, help="seconds after which a build is ended; tensorrt alone")
    kernels.add_argument("--json", action="store_true", help="print JSON")
    kernels.set_defaults(run=_kernels)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="which layers of a Q/DQ file are faster in float on this machine")
    tune.add_argument("path", help="an ONNX file, of any tool")
    tune.add_argument("--target", default="onnxruntime", help="onnxruntime or openvino (default: onnxruntime)")
    tune.add_argument(
        "--shape", action="append", default=[], metavar="NAME=SHAPE", help="sizes of an input: x=1x3x224x224"
    )
    tune.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    tune.add_argument("--rounds", type=int, default=20, help="runs of each file; more see smaller gains (default: 20)")
    tune.add_argument("--output", metavar="FILE.onnx", help="write the file with those layers float")
    tune.add_argument("--json", action="store_true", help="print JSON")
    tune.set_defaults(run=_tune)


def _add_costs(commands: Any) -> None:
    costs = commands.add_parser("costs", help="measure what layers cost on this machine, for prepare(skip_slow=FILE)")
    costs.add_argument("--target", default="onnxruntime", help="the runtime (default: onnxruntime)")
    costs.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    costs.add_argument("--rounds", type=int, default=15, help="runs of each layer (default: 15)")
    costs.add_argument("--output", required=True, metavar="FILE.json", help="where the table goes")
    costs.set_defaults(run=_costs)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="where a model would be quantized, and where not and why")
    _add_model(explain)
    explain.add_argument("--draw", metavar="FILE.svg", help="write the graph with its quantized edges")
    explain.set_defaults(run=_explain)


def _add_cost(commands: Any) -> None:
    cost = commands.add_parser("cost", help="memory that a training step moves and keeps, against the float model's")
    _add_model(cost)
    cost.add_argument("--dynamic-batch", action="store_true", help="sizes as expressions in the batch size")
    cost.set_defaults(run=_cost)


def _add_passes(commands: Any) -> None:
    passes = commands.add_parser("passes", help="the graph between passes: what each one did to it, and what it left")
    _add_model(passes)
    passes.add_argument("--until", metavar="NAME", help="stop after this pass")
    passes.add_argument("--export", action="store_true", help="the passes of an export, ranges from the example inputs")
    passes.set_defaults(run=_passes)


def _add_model(command: argparse.ArgumentParser) -> None:
    """What `_prepared` reads."""
    command.add_argument(
        "model", metavar="MODULE:NAME", help="a module's model, or function that makes it: nn.Module or (module, args)"
    )
    command.add_argument(
        "--input", action="append", metavar="SHAPE[:DTYPE]",
        help="an example input, once for each: 1x3x32x32 (random floats), 1x16:int64 (zeros)",
    )  # fmt: skip
    command.add_argument("--recipe", default="int8", help="a recipe by name (default: int8)")
    command.add_argument("--target", default="onnxruntime", help="the runtime it is for (default: onnxruntime)")
    command.add_argument("--skip", action="append", default=[], metavar="GLOB", help="modules to leave in float")
    command.add_argument("--json", action="store_true", help="print JSON")


def _kernels(given: argparse.Namespace) -> int:
    from fxquant.support.table import table
    from fxquant.targets.registry import configured, get_target

    target = get_target(given.target)
    runtime = configured(target, capability=given.capability, timeout=given.timeout)
    if runtime is None:
        raise fxquant.errors.InvalidArgument(
            f"target must be one that runs here: got {target.name!r}, which has rules alone. Check those: "
            f"python -m fxquant lint {given.path} --target {target.name}"
        )
    runtime.require()
    rows = runtime.kernels(given.path)
    cells = [(r.name, r.op_type, r.kernel, "yes" if r.integer else "no", r.reason or "") for r in rows]
    text = table(("node", "op", "kernel", "integer", "why not"), cells)
    sys.stdout.write(f"{json.dumps([vars(row) for row in rows], indent=2) if given.json else text}\n")
    return 0


def _costs(options: argparse.Namespace) -> int:
    from fxquant.onnx.costing import measure_costs
    from fxquant.onnx.export import check_path

    path = check_path(options.output)
    table = measure_costs(options.target, rounds=options.rounds, threads=options.threads)
    path.write_text(table.to_json())
    slow = sum(row.cost.plain < row.cost.integer for row in table.rows)
    print(f"{path}: {len(table.rows)} layers in {table}; {slow} of them are faster in float")
    print(f"use it as fxquant.prepare(model, args, target={options.target!r}, skip_slow={options.output!r})")
    return 0


def _tune(given: argparse.Namespace) -> int:
    found = fxquant.tune_onnx(
        given.path,
        target=given.target,
        shapes=dict(map(_sizes, given.shape)),
        threads=given.threads,
        rounds=given.rounds,
        output=given.output,
    )
    sys.stdout.write(f"{json.dumps(found.to_dict(), indent=2) if given.json else found}\n")
    return 0


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    """``x=1x3x224x224`` as a name and sizes."""
    name, _, shape = text.rpartition("=")
    if not name or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise fxquant.errors.InvalidArgument(f"--shape must be NAME=SHAPE: got {text!r}. Write x=1x3x224x224.")
    return name, tuple(map(int, shape.split("x")))


def _lint(given: argparse.Namespace) -> int:
    from fxquant.onnx import lint_onnx

    report = lint_onnx(given.path, given.target)
    sys.stdout.write(f"{json.dumps(report.to_dict(), indent=2) if given.json else report}\n")
    return 0 if report else 1


def _explain(given: argparse.Namespace) -> int:
    model, args = _prepared(given)
    found = fxquant.explain(model, args)
    if given.draw:
        found.draw(given.draw)
    sys.stdout.write(f"{json.dumps(found.to_dict(), indent=2) if given.json else found}\n")
    return 0


def _cost(given: argparse.Namespace) -> int:
    model, args = _prepared(given)
    found = fxquant.cost(model, args, dynamic_batch=given.dynamic_batch)
    sys.stdout.write(f"{json.dumps(found.to_dict(), indent=2) if given.json else found}\n")
    return 0


def _passes(given: argparse.Namespace) -> int:
    from fxquant.report.between_passes import steps

    model, args = _prepared(given)
    if given.export:
        fxquant.calibrate(model, [args], progress=False)
    found = steps(model, args, export=given.export, until=given.until)
    if given.json:
        sys.stdout.write(json.dumps([step.to_dict() for step in found], indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{step}\n" for step in found))
    return 0


def _prepared(given: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """The model that was named, prepared as asked, and its example inputs."""
    model, args = _model(given.model)
    if given.input:
        args = tuple(_example(text) for text in given.input)
    if args is None:
        raise fxquant.errors.InvalidArgument(
            f"{given.model} must come with example inputs: got a model alone. "
            "Add --input 1x3x32x32, once for each input, or let it give (model, args)."
        )
    rules = [fxquant.skip(path) for path in given.skip]
    fxquant.prepare(model, args, recipe=given.recipe, target=given.target, rules=rules)
    return model, args


def _model(name: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The model that ``module:name`` leads to, and the example inputs that come with it."""
    from torch import nn

    found = _named(name)
    if not isinstance(found, (nn.Module, tuple)):
        if not callable(found):
            raise _no_model(name, found)
        found = found()
    model, args = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise _no_model(name, found)
    return model, args


def _named(name: str) -> Any:
    """What ``module:a.b`` names; errors inside that module come through."""
    where, _, path = name.partition(":")
    if not where or not path:
        raise fxquant.errors.InvalidArgument(
            f"MODULE:NAME must name a module and something in it: got {name!r}. Write package.models:make_model."
        )
    try:
        found: Any = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise fxquant.errors.InvalidArgument(
            f"MODULE:NAME must name a module that Python finds: got {where!r}. Run from its folder, or set PYTHONPATH."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise fxquant.errors.InvalidArgument(
                f"MODULE:NAME must name something in the module: got {path!r}, and {where} has no such attribute."
            )
        found = getattr(found, part)
    return found


def _no_model(name: str, found: Any) -> fxquant.errors.InvalidArgument:
    return fxquant.errors.InvalidArgument(
        f"{name} must be or return an nn.Module, or (module, args): got {type(found).__name__}."
    )


def _example(text: str) -> Any:
    """``1x3x32x32`` as random floats, the same at each call; ``2x7:int64`` as zeros, which index any table."""
    import torch

    shape, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or (dtype or "float32") not in _DTYPES:
        raise fxquant.errors.InvalidArgument(
            f"--input must be a shape, and maybe a type of {', '.join(_DTYPES)}: got {text!r}. Write 1x3x32x32 or "
            "1x16:int64."
        )
    sizes, kind = tuple(map(int, shape.split("x"))), getattr(torch, dtype or "float32")
    if not kind.is_floating_point:
        return torch.zeros(sizes, dtype=kind)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(kind)


if __name__ == "__main__":
    sys.exit(main())
