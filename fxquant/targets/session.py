"""Running an exported model in onnxruntime on the CPU: its outputs, its codes, its speed.

Without optimizations it executes Q/DQ as the standard says, which makes it the reference for the files of every
target. Nothing here changes the file: what needs another graph works on a copy in memory.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.errors import ExportError, InvalidArgument
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, Wiring, folder_of, load_model
from fxquant.targets.in_turns import in_turns
from fxquant.targets.rounded import is_beyond_onnxruntime, rounded
from fxquant.targets.shown_codes import code_values, show
from fxquant.targets.standard import bits, needs_standard, run_standard

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime

REFERENCE = "onnxruntime"

# Without VNNI its kernels add two products of uint8 and int8 in 16 bits; with this they multiply wider, more slowly.
EXACT_SUMS = {"session.x64quantprecision": "1"}

# Graph optimization levels of onnxruntime, from none to all; not every version has each.
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}

def session(
    model: ModelPath | bytes,
    *,
    optimize: bool,
    level: str | None = None,
    threads: int | None = None,
    optimized_path: ModelPath | None = None,
    config: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A quiet session on the CPU, with every graph optimization or with none, or with those of a level of `levels`.

    ``threads`` is the size of the pool inside a node, ``None`` for onnxruntime's choice. ``optimized_path``
    receives the graph that will run. ``config`` holds further session entries: a model in bytes finds its
    external data through ``data_folder``. Unoptimized, a file of a half type that it has no kernels for runs as
    `rounded`. Raises ``ExportError`` where onnxruntime refuses the model.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    chosen = _LEVELS[level or ("all" if optimize else "disable")]
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, chosen)
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_path)
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else os.fspath(model) if optimize else _readable(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        subject = "The model" if isinstance(model, bytes) else os.fspath(model)
        raise ExportError(f"{subject} must load in onnxruntime {ort.__version__}: got {error}") from error


def levels() -> tuple[str, ...]:
    """Graph optimization levels that the installed onnxruntime has, from none to all."""
    found = require("onnxruntime").GraphOptimizationLevel
    return tuple(name for name, constant in _LEVELS.items() if hasattr(found, constant))


def runs_as_written(path: ModelPath) -> bool:
    """Whether onnxruntime has kernels for a file as it is, and it is not run as `rounded` or by onnx's evaluator."""
    model = load_model(path)
    return not needs_standard(model) and not is_beyond_onnxruntime(model)


def is_newer_than_onnxruntime(model: onnx.ModelProto) -> bool:
    """Whether the installed onnxruntime refuses any file of the model's opsets, or of its format."""
    ort, onnx = require("onnxruntime"), require("onnx")
    value = onnx.helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "empty", [value], [value])
    empty = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(empty.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # as above
        return True
    return False


def _readable(path: ModelPath) -> str | bytes:
    """The path, or the model in types that onnxruntime has; what is no model onnxruntime may say itself."""
    try:
        model = load_model(path)
    except ExportError:
        return os.fspath(path)
    return rounded(model, folder_of(path)).SerializeToString() if is_beyond_onnxruntime(model) else os.fspath(path)


def _beyond(path: ModelPath) -> onnx.ModelProto | None:
    """The model, whole, where onnxruntime has no kernels for it; None where it has, or it is no model."""
    try:
        model = load_model(path)
    except ExportError:
        return None
    if not needs_standard(model):
        return None
    require("onnx").load_external_data_for_model(model, folder_of(path))
    return model


def data_folder(path: ModelPath) -> dict[str, str]:
    """The session entry that lets a model given as bytes find the external data beside ``path``."""
    return {"session.model_external_initializers_file_folder_path": str(Path(path).absolute().parent)}


def input_names(path: ModelPath) -> list[str]:
    """The model's inputs, in the graph's order. Raises ``ExportError`` where the model does not load."""
    model = _beyond(path)
    if model is not None:
        return [value.name for value in model.graph.input]
    return [value.name for value in session(path, optimize=False).get_inputs()]


def run_outputs(
    path: ModelPath,
    feeds: Feeds,
    *,
    optimize: bool,
    level: str | None = None,
    config: Mapping[str, str] | None = None,
) -> list[np.ndarray]:
    """The model's outputs, in the graph's order; ``level`` and ``config`` as in `session`.

    Raises ``ExportError`` where the model does not load or a node fails while it runs (that it loads is no
    proof: fused per-channel activations fail only then), ``InvalidArgument`` for feeds of other names.
    """
    if not optimize and (model := _beyond(path)) is not None:
        return run_standard(model, None, feeds)
    return run_session(session(path, optimize=optimize, level=level, config=config), None, feeds)


def run_codes(
    path: ModelPath, feeds: Feeds, *, also: Collection[str] = (), level: str | None = None
) -> dict[str, np.ndarray]:
    """What every activation QuantizeLinear of the graph gives, by the labels of `code_values`.

    ``also`` names those that are known to be activations though no input reaches them, as position embeddings.
    Runs without optimizations, so that each Q is one node and its arithmetic the standard's, or at a ``level`` of
    `levels`: a kernel that a Q became a part of gives the codes then. Integers of 2 or
    4 bits come widened to 8; float8 codes come as their bits in uint8. Raises as ``run_outputs``.
    """
    model = load_model(path)
    model = rounded(model, folder_of(path)) if is_beyond_onnxruntime(model) else model
    wiring = Wiring(model=model, folder=folder_of(path))
    names = show(wiring, code_values(wiring, also))
    if not names:
        return {}
    if needs_standard(model):
        require("onnx").load_external_data_for_model(model, folder_of(path))
        return {k: bits(v) for k, v in zip(names, run_standard(model, list(names.values()), feeds), strict=True)}
    built = session(model.SerializeToString(), optimize=False, level=level, config=data_folder(path))
    return dict(zip(names, run_session(built, list(names.values()), feeds), strict=True))


def values_of(path: ModelPath, feeds: Feeds, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of the graph by their names, outputs or not; without optimizations. Raises as ``run_outputs``."""
    model = load_model(path)
    model = rounded(model, folder_of(path)) if is_beyond_onnxruntime(model) else model
    shown = {output.name for output in model.graph.output}
    model.graph.output.extend(require("onnx").ValueInfoProto(name=name) for name in names if name not in shown)
    if not names:
        return {}
    built = session(model.SerializeToString(), optimize=False, config=data_folder(path))
    return dict(zip(names, run_session(built, names, feeds), strict=True))


def latency(paths: Mapping[str, ModelPath], feeds: Feeds, *, rounds: int = 30, threads: int = 1) -> dict[str, float]:
    """Median seconds of one run of each model: medians of `samples`."""
    found = samples({key: (path, feeds) for key, path in paths.items()}, rounds=rounds, threads=threads)
    return {key: statistics.median(values) for key, values in found.items()}


def samples(
    cases: Mapping[str, tuple[ModelPath, Feeds]], *, rounds: int, threads: int = 1
) -> dict[str, list[float]]:
    """Seconds of one run of each model in each round, all optimized, one after the other in every round.

    Each model is warmed up first, and the order turns with the rounds; one thread is timed by its CPU time. Raises as
    ``run_outputs``, and ``InvalidArgument`` for ``rounds`` below 1.
    """
    # Idle pools that spin would take the cores from the model being timed.
    still = {"session.intra_op.allow_spinning": "0"}
    sessions = {k: session(path, optimize=True, threads=threads, config=still) for k, (path, _) in cases.items()}
    for key, built in sessions.items():
        run_session(built, None, cases[key][1])  # whose errors say more than a bare run's
    return in_turns(
        {k: functools.partial(built.run, None, _as_declared(built, cases[k][1])) for k, built in sessions.items()},
        rounds=rounds,
        threads=threads,
    )


def _as_declared(built: onnxruntime.InferenceSession, feeds: Feeds) -> dict[str, np.ndarray]:
    """Floats in the type that the session's inputs have: that of a file's edges is its exporter's choice."""
    kinds = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64"}
    wanted = {value.name: kinds.get(value.type) for value in built.get_inputs()}
    return {
        name: array.astype(wanted[name], copy=False) if array.dtype.kind == "f" and wanted[name] else array
        for name, array in feeds.items()
    }


def run_session(built: onnxruntime.InferenceSession, names: Sequence[str] | None, feeds: Feeds) -> list[np.ndarray]:
    """Values by name, the outputs for None. Raises ``ExportError`` and ``InvalidArgument`` as ``run_outputs``."""
    wanted = [value.name for value in built.get_inputs()]
    if set(wanted) != set(feeds):
        raise InvalidArgument(f"feeds must name the model's inputs {wanted}: got {list(feeds)}.")
    options = require("onnxruntime").RunOptions()
    options.log_severity_level = 4
    try:
        return list(built.run(names, _as_declared(built, feeds), options))
    except Exception as error:  # as in session
        raise ExportError(f"The model must run in onnxruntime: got {error}") from error
