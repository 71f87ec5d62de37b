"""TensorRT for RTX on this machine: NVIDIA's parser and builder, which need no GPU, and what they made of a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxquant.errors import ExportError, InvalidArgument, MissingDependency
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, Wiring, all_nodes, folder_of, load_model
from fxquant.targets.target import WEIGHTED, KernelRow, Ran
from fxquant.targets.tensorrt_plan import PRODUCTS, Operation, operations
from fxquant.targets.tensorrt_reasons import CODES, reason

if TYPE_CHECKING:
    import onnx

# Compute capabilities that the builder can be asked for.
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

# A folder on sys.path could hide the package or a module of Python: run_path adds none, and the one that -c adds goes.
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv = sys.argv[1:]; "
    "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
)
_PROGRAM = Path(__file__).with_name("tensorrt_build.py")
_MARK = "fxquant_product_"
_OLDEST = (1, 7)  # 1.4 to 1.6 end int8 convolutions in a build error
TIMEOUT = 3600.0  # seconds of a build: twelve layers of a transformer take 8 on two busy cores
_NO_OPERANDS = ("bool", "int32", "int64")


def require_builder() -> ModuleType:
    """NVIDIA's package. Raises MissingDependency, with the command that installs it, where it is absent or too old."""
    found = require(
        "tensorrt_rtx",
        "tensorrt_rtx must be installed to build a model for target 'tensorrt': it is not. "
        'Run `pip install "fxquant[tensorrt]"`. It needs no GPU.',
    )
    version = str(found.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise MissingDependency(
            f"tensorrt_rtx must be 1.7 or newer to build a model for target 'tensorrt': got {version}, whose builder "
            'has no int8 convolutions. Run `pip install --upgrade "fxquant[tensorrt]"`.'
        )
    return found


def run(path: ModelPath, feeds: Feeds, *, capability: str | None = None, timeout: float = TIMEOUT) -> Ran:
    """Parses and builds the file for the inputs' sizes; no kernel runs.

    Raises ExportError where the file does not parse or build, with NVIDIA's own words, or not within ``timeout``
    seconds; InvalidArgument for an unknown ``capability``; MissingDependency without tensorrt_rtx.
    """
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    version, rows = _build(path, shapes, capability, timeout)
    return Ran(runtime=f"TensorRT for RTX {version}", rows=rows, outputs=None)


def kernel_rows(path: ModelPath, *, capability: str | None = None, timeout: float = TIMEOUT) -> tuple[KernelRow, ...]:
    """A row per product of the file, open sizes taken as 1 to 8. Raises as `run`."""
    return _build(path, {}, capability, timeout)[1]


def _build(
    path: ModelPath, shapes: Mapping[str, Sequence[int]], capability: str | None, timeout: float
) -> tuple[str, tuple[KernelRow, ...]]:
    version = str(require_builder().__version__)
    model = load_model(path)
    wiring = Wiring(model=model, folder=folder_of(path))
    exported = [node for node in all_nodes(model.graph) if _multiplies(node)]
    with tempfile.TemporaryDirectory() as folder:
        marked, plan = Path(folder) / "marked.onnx", Path(folder) / "model.plan"
        names = _mark(exported)
        marked.write_bytes(model.SerializeToString())
        for node, name in zip(exported, names, strict=True):
            node.name = name
        asked = {
            "model": str(marked),
            "location": str(Path(path).absolute()),
            "plan": str(plan),
            "shapes": shapes,
            "capability": _capability(capability),
        }
        guessed = _guessed(model, shapes)
        _check(
            _answer(asked, Path(folder), f"{os.fspath(path)} must build in TensorRT for RTX {version}", timeout),
            path,
            names,
            guessed,
        )
        compiled = operations(plan)
    return version, tuple(_row(node, index, compiled, wiring, capability) for index, node in enumerate(exported))


def _multiplies(node: onnx.NodeProto) -> bool:
    return node.op_type in WEIGHTED or (node.op_type == "Einsum" and len(node.input) > 1)


def _mark(exported: list[onnx.NodeProto]) -> list[str]:
    """Names the nodes so that no two are alike, and gives their names before: the plan tells nodes by name."""
    names = [node.name for node in exported]
    for index, node in enumerate(exported):
        node.name = f"{_MARK}{index}"
    return names


def _guessed(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> str:
    """What a failed build may be due to: inputs whose sizes the builder was not told."""
    constants = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in {*shapes, *constants}]
    sizes = {value.name: [size for size in value.type.tensor_type.shape.dim if not size.dim_value] for value in given}
    told = "; ".join(f"{name}: {', '.join(s.dim_param or '?' for s in sizes[name])}" for name in sizes if sizes[name])
    verified = "fxquant.verify_onnx builds it for the sizes of its inputs"
    return told and f". Its open sizes ({told}) were taken as 1 to 8: {verified}."


def _capability(asked: str | None) -> list[int] | None:
    if asked is None:
        return None
    if asked not in CAPABILITIES:
        raise InvalidArgument(f"capability must be one of {', '.join(map(repr, CAPABILITIES))}: got {asked!r}.")
    return [int(part) for part in asked.split(".")]


def _answer(asked: Mapping[str, Any], folder: Path, rule: str, timeout: float) -> dict[str, Any]:
    """What the program found, in a process of its own; ``rule`` begins the error where it found nothing."""
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps(asked))
    command = [sys.executable, "-c", _START, str(_PROGRAM), str(request), str(answer)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"{rule} within {timeout:g} s: it had not ended by then. Give a longer timeout, or a smaller model."
        ) from None
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ExportError(f"{rule}: it ended with {how}: {said}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _check(answer: Mapping[str, Any], path: ModelPath, names: Sequence[str], guessed: str) -> None:
    """Raises ExportError where the file was not parsed or not built."""
    where = f"{os.fspath(path)} must {{}} in TensorRT for RTX {answer['version']}: got "
    if not answer["parsed"]:
        errors = [f"{op} '{_unmarked(node, names)}': {text}" if op else text for node, op, text in answer["errors"]]
        raise ExportError(where.format("parse") + ("; ".join(errors) or _logged(answer, names)))
    if not answer["built"]:
        raise ExportError(where.format("build") + _logged(answer, names) + guessed)


def _logged(answer: Mapping[str, Any], names: Sequence[str]) -> str:
    errors = [_unmarked(text, names) for severity, text in answer["log"] if severity == "error"]
    return "; ".join(errors) or "no reason"


def _unmarked(text: str, names: Sequence[str]) -> str:
    for index in reversed(range(len(names))):  # 12 before 1
        text = text.replace(f"{_MARK}{index}", names[index])
    return text


def _row(
    node: onnx.NodeProto, index: int, compiled: list[Operation], wiring: Wiring, capability: str | None
) -> KernelRow:
    mark = f"{_MARK}{index}"
    standing = [each for each in compiled if mark in each.nodes]
    products = [each for each in standing if each.kind in PRODUCTS]
    integer = bool(products) and all(_is_integer(each) for each in products)
    kernel = ", ".join(dict.fromkeys(map(_title, products or standing[:1]))) or "none"
    return KernelRow(
        name=node.name or node.output[0],
        op_type=node.op_type,
        kernel=kernel,
        integer=integer,
        reason=None if integer else reason(node, products, wiring, capability),
    )


def _operands(product: Operation) -> tuple[str, ...]:
    """What is multiplied: scales and biases come after; a fused attention reads masks and sizes too, in any order."""
    if product.kind != "_gemm_mha_v2":
        return product.reads[:2]
    floats = [kind for kind in product.reads if kind not in _NO_OPERANDS]
    return tuple(sorted(floats, key=floats.count, reverse=True)[:3])  # a float mask is one of four


def _is_integer(product: Operation) -> bool:
    """Whether it multiplies codes, be they integers or small floats."""
    kinds = set(_operands(product))
    return len(kinds) == 1 and kinds.issubset(CODES)


def _title(operation: Operation) -> str:
    if operation.kind not in PRODUCTS:
        return f"{operation.kind} {operation.name}"
    return f"{PRODUCTS[operation.kind]} {'·'.join(_operands(operation))}"
