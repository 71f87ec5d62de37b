"""`tune_onnx`: which layers of a Q/DQ file are faster in float, in a runtime of this machine."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fxquant.errors import InvalidArgument
from fxquant.onnx.export import check_path
from fxquant.onnx.tuning.choose import Choice, choose
from fxquant.onnx.tuning.files import Clock, Files, write
from fxquant.onnx.tuning.graph import DEQUANTIZE, QUANTIZE, QdqGraph
from fxquant.onnx.tuning.inputs import Shapes, feeds_for
from fxquant.onnx.tuning.layers import LayerClass, Layers, by_key
from fxquant.onnx.tuning.measure import Compared
from fxquant.onnx.tuning.report import LayerRow, TuneReport
from fxquant.onnx.tuning.rules import Modules
from fxquant.support.progress import counting
from fxquant.support.require import require
from fxquant.targets.cpu import cpu_name, integer_dot_support
from fxquant.targets.document import Feeds, ModelPath, all_nodes, folder_of, load_model
from fxquant.targets.in_turns import clock_of
from fxquant.targets.registry import TARGETS, get_target
from fxquant.targets.session import values_of
from fxquant.targets.target import Runtime, Target

if TYPE_CHECKING:
    import onnx


def tune_onnx(
    path: ModelPath,
    *,
    target: str = "onnxruntime",
    shapes: Shapes | None = None,
    feeds: Feeds | None = None,
    threads: int = 1,
    rounds: int = 20,
    margin: float = 1.02,
    output: ModelPath | None = None,
    progress: bool = True,
) -> TuneReport:
    """Measures which layers of a Q/DQ file are slower as integers than in float, and says what to leave float.

    A layer is a Conv, ConvTranspose, Gemm or MatMul that reads a DequantizeLinear. Layers of one class (operator,
    shapes, attributes) are decided together: first one of them by itself, as integers and in float, then whole files
    in which some classes are float, interleaved in one process. A layer is float where that is faster beyond the
    noise, by itself by ``margin`` or in the whole file; the file with all of the chosen ones must be faster than the
    given one by ``margin`` in rounds of its own, and at least as fast as every other candidate, or nothing is
    recommended. Any tool's Q/DQ file will do; one that `fxquant.export_onnx` wrote tells the modules, and the report's
    ``rules`` go to `fxquant.prepare`. The file is left as it is.

    Args:
        target: the runtime, onnxruntime or openvino.
        shapes: sizes of inputs, where the file leaves more open than the first dimension, which is 1 by default.
        feeds: inputs themselves; what is not given is made up (floats from a normal distribution, zeros for others).
        threads: of the runtime. One thread is timed by the CPU time of the process, where the system counts it finely,
            so that other work on the machine counts less; several by the time that passes.
        rounds: runs of each file, of which the medians count; more rounds see smaller gains.
        margin: the least factor by which float must be faster.
        output: where the file with the chosen layers float goes: their weights are those of the integers, as floats.

    Raises:
        InvalidArgument: a target whose runs are not timed here; no Q/DQ file, or no layer in it; sizes that are not
            known or do not fit; numbers out of range; an output that cannot be written.
        ExportError: the file, or a variant of it, does not load or run.
        MissingDependency: onnx or the runtime is not installed; the message holds the install command.
    """
    found = get_target(target)
    runtime = _runtime(found)
    _check_numbers(threads, rounds, margin)
    destination = None if output is None else _destination(output, path)
    with counting("tuning", show=progress) as step:
        tuning = _Tuning(path, found, _Settings(threads=threads, rounds=rounds, margin=margin), step)
        report, model = tuning.run(functools.partial(_timed, runtime, threads), shapes, feeds)
    if destination is None:
        return report
    write(model, destination)
    return dataclasses.replace(report, output=os.fspath(destination))


def _timed(
    runtime: Runtime, threads: int, cases: Mapping[str, tuple[ModelPath, Feeds]], rounds: int
) -> Mapping[str, Sequence[float]]:
    assert runtime.samples is not None, "asked before"
    return runtime.samples(cases, rounds=rounds, threads=threads)


def _runtime(target: Target) -> Runtime:
    runtime = target.runtime
    if runtime is None or runtime.samples is None:
        timed = ", ".join(repr(name) for name, each in TARGETS.items() if each.runtime and each.runtime.samples)
        raise InvalidArgument(f"target must be one whose runs are timed here, {timed}: got {target.name!r}.")
    for name in ("onnx", "onnxruntime"):
        require(name)
    runtime.require()
    return runtime


def _destination(output: ModelPath, path: ModelPath) -> Path:
    found = check_path(output)
    if found.exists() and os.path.exists(path) and os.path.samefile(found, path):
        raise InvalidArgument(f"output must be another file than path: got {os.fspath(output)!r} for both.")
    return found


def _check_numbers(threads: int, rounds: int, margin: float) -> None:
    if threads < 1:
        raise InvalidArgument(f"threads must be at least 1: got {threads}.")
    if rounds < 3:
        raise InvalidArgument(f"rounds must be at least 3, or noise cannot be told: got {rounds}.")
    if not margin >= 1:
        raise InvalidArgument(f"margin must be a factor of at least 1: got {margin}.")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    threads: int
    rounds: int
    margin: float


class _Tuning:
    """One file being tuned."""

    def __init__(self, path: ModelPath, target: Target, settings: _Settings, step: Callable[[str], None]) -> None:
        self.path, self.target, self.settings, self.step = path, target, settings, step
        self.graph = _graph(path, target)

    def run(self, clock: Clock, shapes: Shapes | None, feeds: Feeds | None) -> tuple[TuneReport, onnx.ModelProto]:
        """The report, and the model that it recommends."""
        inputs, words = feeds_for(self.graph.model, shapes, feeds)
        self.step("one run of the file")
        layers = Layers(self.graph)
        arrays = _hollow({**inputs, **values_of(self.path, inputs, layers.values())})
        classes = layers.classes(arrays)
        with tempfile.TemporaryDirectory(prefix="fxquant-tune-") as folder:
            files = Files(self.graph, classes, inputs, Path(folder), clock, self.settings.rounds, self.step)
            alone = files.alone(layers, arrays)
            choice = choose(alone, files.against, self.settings.margin)
        return self._report(classes, alone, choice, words), files.variant(choice.floats)

    def _report(
        self, classes: Sequence[LayerClass], alone: Mapping[int, Compared], choice: Choice, words: str
    ) -> TuneReport:
        graph, modules = self.graph, Modules(self.graph)
        rows = _rows(graph, modules, classes, alone, choice)
        chosen = [key for key, row in rows.items() if row.is_float]
        applied = modules.instructions(chosen)
        gone = graph.followers.keys() - graph.staying(chosen)
        return TuneReport(
            path=os.fspath(self.path),
            runtime=f"{self.target.name} {_installed(self.target)}",
            cpu=cpu_name(),
            threads=self.settings.threads,
            rounds=self.settings.rounds,
            clock=clock_of(self.settings.threads),
            inputs=words,
            rows=tuple(rows.values()),
            along=tuple(graph.top[key].name or key for key in graph.top if key in gone),
            left_alone=graph.left_alone,
            before=(choice.confirmed or choice.every).reference,
            after=choice.every.reference if choice.confirmed is None else choice.confirmed.seconds,
            plain=choice.every.seconds,
            integer_dot=integer_dot_support(),
            rules=applied.rules,
            override=applied.override,
            unknown=applied.unknown,
            output=None,
        )


def _installed(target: Target) -> str:
    return str(_runtime(target).require().__version__).partition("-")[0]


def _hollow(arrays: Feeds) -> dict[str, np.ndarray]:
    """Of each array its shape and type, in the memory of one number."""
    return {name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in arrays.items()}


def _graph(path: ModelPath, target: Target) -> QdqGraph:
    """The file with its weights. Raises InvalidArgument where it has no layer to decide about."""
    model = load_model(path)
    ops = {node.op_type for node in all_nodes(model.graph)}
    if not ops & {QUANTIZE, DEQUANTIZE}:
        kinds = sorted(op for op in ops if op.startswith("QLinear") or op in ("QGemm", "MatMulInteger", "ConvInteger"))
        held = f"one of {', '.join(kinds)} nodes" if kinds else "one without a QuantizeLinear or DequantizeLinear"
        raise InvalidArgument(
            f"path must be a Q/DQ file: got {held} ({os.fspath(path)}). "
            "Write it with fxquant.export_onnx, or with another tool in its QDQ format."
        )
    require("onnx").load_external_data_for_model(model, folder_of(path))
    needs = ("Conv",) if "conv" in target.profile.needs_output else ()
    graph = QdqGraph(model=model, folder=folder_of(path), needs_output=needs)
    if not graph.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in graph.left_alone) or "none reads a DequantizeLinear"
        raise InvalidArgument(f"path must have a Conv, Gemm or MatMul that may be float: got none ({why}).")
    return graph


def _rows(
    graph: QdqGraph, modules: Modules, classes: Sequence[LayerClass], alone: Mapping[int, Compared], choice: Choice
) -> dict[str, LayerRow]:
    found, numbers = {}, by_key(classes)
    for key, node in graph.layers.items():
        number = numbers[key]
        kind, single, whole = classes[number], alone[number], choice.effects[number]
        is_float = number in choice.floats
        found[key] = LayerRow(
            name=node.name or key,
            module=modules.path(key),
            op_type=kind.op_type,
            shape=kind.shape,
            integer=single.reference,
            plain=single.seconds,
            effect=-whole.gain / len(kind.keys),
            noise=whole.noise / len(kind.keys),
            is_float=is_float,
            reason=_reason(is_float, single, whole),
        )
    return found


def _reason(is_float: bool, single: Compared, whole: Compared) -> str:
    """Why a layer is as it is."""
    form = "float" if is_float else "integers"
    if whole.is_faster():
        return "one run gained by the other way, and the run that was to confirm it did not"
    if whole.is_slower:
        return f"the file is slower without its {form}"
    if is_float:
        return f"{single.reference / single.seconds:.2f} times as fast in float by itself"
    if single.is_faster():
        return "faster in float by itself, but not in the file beyond margin and noise"
    return "no faster in float"
