"""The command line: each command with its options, and what completes them."""

from __future__ import annotations

from typing import Any

from fxquant.shell import commands
from fxquant.shell.called_as import called_as
from fxquant.shell.tree import FILE, RECIPE, TARGET, Parser, completed


def parser(version: str) -> Parser:
    """The tree of commands; each sets ``run``, a function of what was given, but for the demo, which parses itself."""
    found = Parser(
        prog=called_as(),
        description="Quantization-aware training for ONNX.",
        epilog="Exit status: 0 is good, 1 is not (the reason is on stderr), 2 is usage. What prints a report takes "
        "--json; docs/shell.md has the fields.",
    )
    found.add_argument("--version", action="version", version=f"fxquant {version}")
    found.add_argument("--traceback", action="store_true", help="let errors come through as Python prints them")
    added = found.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_doctor(found, added)
    _add_demo(found, added)
    _add_explain(found, added)
    _add_cost(found, added)
    _add_passes(found, added)
    _add_lint(found, added)
    _add_kernels(found, added)
    _add_tune(found, added)
    _add_costs(found, added)
    _add_completion(found, added)
    return found


def _add_doctor(tree: Parser, added: Any) -> None:
    doctor = tree.add_command(added, "doctor", "what is installed and works on this machine, and how to get the rest")
    doctor.add_argument("--quick", action="store_true", help="leave out what compiles: seconds instead of a minute")
    _add_json(doctor)
    doctor.set_defaults(run=commands.doctor)


def _add_demo(tree: Parser, added: Any) -> None:
    tree.add_command(added, "demo", "train, quantize, export and verify two nets on handwritten digits", add_help=False)


def _add_explain(tree: Parser, added: Any) -> None:
    explain = tree.add_command(added, "explain", "where a model would be quantized, and where not and why")
    _add_model(explain)
    completed(explain.add_argument("--draw", metavar="FILE.svg", help="write the graph with its quantized edges"), FILE)
    explain.set_defaults(run=commands.explain)


def _add_cost(tree: Parser, added: Any) -> None:
    cost = tree.add_command(added, "cost", "memory that a training step moves and keeps, against the float model's")
    _add_model(cost)
    cost.add_argument("--dynamic-batch", action="store_true", help="sizes as expressions in the batch size")
    cost.set_defaults(run=commands.cost)


def _add_passes(tree: Parser, added: Any) -> None:
    passes = tree.add_command(added, "passes", "the graph between passes: what each one did to it, and what it left")
    _add_model(passes)
    passes.add_argument("--until", metavar="NAME", help="stop after this pass")
    passes.add_argument("--export", action="store_true", help="the passes of an export, ranges from the example inputs")
    passes.set_defaults(run=commands.passes)


def _add_lint(tree: Parser, added: Any) -> None:
    lint = tree.add_command(added, "lint", "check an ONNX file against a target's rules; 1 where it breaks one")
    completed(lint.add_argument("path", help="an ONNX file"), FILE)
    _add_target(lint)
    _add_json(lint)
    lint.set_defaults(run=commands.lint)


def _add_kernels(tree: Parser, added: Any) -> None:
    kernels = tree.add_command(added, "kernels", "which nodes of an ONNX file its runtime runs on integers")
    completed(kernels.add_argument("path", help="an ONNX file"), FILE)
    _add_target(kernels)
    kernels.add_argument("--capability", help="compute capability to build for, such as 8.9; tensorrt alone")
    kernels.add_argument("--timeout", type=float, help="seconds after which a build is ended; tensorrt alone")
    _add_json(kernels)
    kernels.set_defaults(run=commands.kernels)


def _add_tune(tree: Parser, added: Any) -> None:
    tune = tree.add_command(added, "tune", "which layers of a Q/DQ file are faster in float on this machine")
    completed(tune.add_argument("path", help="an ONNX file, of any tool"), FILE)
    _add_target(tune, help="onnxruntime or openvino (default: onnxruntime)")
    tune.add_argument(
        "--shape", action="append", default=[], metavar="NAME=SHAPE", help="sizes of an input: x=1x3x224x224"
    )
    tune.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    tune.add_argument("--rounds", type=int, default=20, help="runs of each file; more see smaller gains (default: 20)")
    written = tune.add_argument("--output", metavar="FILE.onnx", help="write the file with those layers float")
    completed(written, FILE)
    _add_json(tune)
    tune.set_defaults(run=commands.tune)


def _add_costs(tree: Parser, added: Any) -> None:
    costs = tree.add_command(added, "costs", "measure what layers cost on this machine, for prepare(skip_slow=FILE)")
    _add_target(costs, help="the runtime (default: onnxruntime)")
    costs.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    costs.add_argument("--rounds", type=int, default=15, help="runs of each layer (default: 15)")
    completed(costs.add_argument("--output", required=True, metavar="FILE.json", help="where the table goes"), FILE)
    costs.set_defaults(run=commands.costs)


def _add_completion(tree: Parser, added: Any) -> None:
    completion = tree.add_command(added, "completion", "a script that completes commands and options of fxquant by Tab")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="docs/shell.md says where it goes")
    completion.set_defaults(run=commands.completion, tree=tree)


def _add_model(command: Parser) -> None:
    """What `fxquant.shell.models.prepared` reads."""
    command.add_argument(
        "model", metavar="MODULE:NAME", help="a module's model, or function that makes it: nn.Module or (module, args)"
    )
    command.add_argument(
        "--input", action="append", metavar="SHAPE[:DTYPE]",
        help="an example input, once for each: 1x3x32x32 (random floats), 1x16:int64 (zeros)",
    )  # fmt: skip
    recipe = command.add_argument("--recipe", default="int8", help="a recipe by name (default: int8)")
    completed(recipe, RECIPE)
    _add_target(command)
    command.add_argument("--skip", action="append", default=[], metavar="GLOB", help="modules to leave in float")
    _add_json(command)


def _add_target(command: Parser, help: str = "the runtime it is for (default: onnxruntime)") -> None:
    completed(command.add_argument("--target", default="onnxruntime", help=help), TARGET)


def _add_json(command: Parser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")
