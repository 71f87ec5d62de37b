"""`verify_onnx`: the proof, by loading the artifact, that it does what training saw, as integers."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxquant.capture.aside import evaluating
from fxquant.capture.exported import exported_graph
from fxquant.capture.in_float32 import in_float32, widened
from fxquant.capture.open_sizes import open_batch
from fxquant.capture.scaled_tables import scaled_tables
from fxquant.errors import ExportError, InvalidArgument, MissingDependency
from fxquant.onnx.compare import Case, compare_codes, compare_parts, largest_difference, running, within_code
from fxquant.onnx.edges import Edges
from fxquant.onnx.levels import LARGE, compare_levels, is_large
from fxquant.onnx.lint import LintReport, lint_onnx
from fxquant.onnx.verify_report import CodeRow, LevelRow, VerifyReport
from fxquant.onnx.write import save, to_onnx
from fxquant.prepared.root import require_plan, unwrap
from fxquant.prepared.unset import unset_as_deployed
from fxquant.probe.visitor import Run
from fxquant.support.progress import counting
from fxquant.support.require import require
from fxquant.targets.document import ModelPath
from fxquant.targets.registry import configured, get_target
from fxquant.targets.session import REFERENCE, run_outputs
from fxquant.targets.target import KernelRow, Runtime, Target

if TYPE_CHECKING:
    import numpy as np


def verify_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 30,
    runtime: str | None = None,
    capability: str | None = None,
    timeout: float | None = None,
) -> VerifyReport:
    """Loads the exported file and holds it to the prepared model on the given inputs.

    Runs it in onnxruntime without optimizations, which executes Q/DQ as the standard says (codes at every
    QuantizeLinear and outputs against `fxquant_eager`), at each of its graph optimization levels (the same), then as
    the model's target does: in onnxruntime with all optimizations (outputs, kernels, and ``rounds`` timed runs against
    an export of the float model, on one thread, interleaved, medians; 0 times nothing, and exports no float model), in
    OpenVINO (outputs, kernels, codes), or parsed and built by TensorRT for RTX, which needs no GPU (kernels, and the
    target's rules). Where tensorrt_rtx is not installed, and for generic, it checks the rules alone. Changes neither
    model nor file.

    Args:
        runtime: a target's name, to run the file in another runtime than its own's; named, it must be installed.
        capability: the compute capability to build for, such as ``"8.9"``; None: one that the builder chooses. For
            TensorRT alone.
        timeout: seconds after which a build is ended; None: an hour. For TensorRT alone.

    Raises InvalidArgument (not prepared, no such file, inputs of another kind, a runtime or capability that is not
    known), ExportError (the file does not load, build or run, or not in time; it quantizes activations and the
    model's run came by none of them), MissingDependency (onnx, onnxruntime, the target's runtime).
    """
    plan = require_plan(model, "verify_onnx")
    target = get_target(plan.target) if runtime is None else get_target(runtime, "runtime")
    asked = configured(target, capability=capability, timeout=timeout)
    run = _runtime(target, asked, path, named=runtime is not None)
    keys = tuple(site.key for site in plan.sites)
    case = Case(model=unwrap(model), args=args, kwargs=dict(kwargs or {}), path=path, keys=keys)
    with counting("verify_onnx") as step, unset_as_deployed(case.model), scaled_tables(case.model):
        step("comparing codes")
        with running(case) as model_run:
            compared, cascaded, trained = compare_codes(case, model_run)
            unoptimized = run_outputs(path, case.feeds, optimize=False)
            step("comparing levels and runtimes")
            rows = compare_levels(case, model_run, unoptimized)
            own, unread = _own_codes(run, case, model_run)
        step(f"running it for {target.name}")
        try:
            measured = _in_target(run, get_target(plan.target), case, trained, unoptimized, rounds)
        except ExportError as error:
            raise ExportError(f"{error}{_loading(rows)}") from error
    return VerifyReport(
        path=os.fspath(path),
        target=plan.target,
        codes=tuple(compared.rows),
        not_compared=tuple(sorted(compared.not_compared)),
        input_differing_codes=compared.at_inputs,
        cascaded_codes=sum(row.differing for row in cascaded.rows),
        max_output_difference=largest_difference(unoptimized, trained),
        output_spread=float(max((value.std() for value in trained), default=0.0)),
        levels=rows,
        roundings=tuple(sorted({str(s.local.spec.rounding) for s in plan.sites if s.local.role != "weight"})),
        runtime_codes=own,
        runtime_codes_error=unread,
        **vars(measured),
    )


def _runtime(target: Target, found: Runtime | None, path: ModelPath, *, named: bool) -> Runtime | None:
    """What the file is run in; None where its rules are all there is. Raises what `verify_onnx` does."""
    for name in ("onnx", "onnxruntime"):
        require(name)
    if found is None and named:
        raise InvalidArgument(f"runtime must be one that runs here: got {target.name!r}, which has rules alone.")
    if found is not None:
        try:
            found.require()
        except MissingDependency:
            if named or not found.rules_do:
                raise
            found = None
    if not Path(path).is_file():
        raise InvalidArgument(f"path must be an exported ONNX file: got {os.fspath(path)!r}, which does not exist.")
    return found


def _loading(rows: tuple[LevelRow, ...]) -> str:
    """At which levels onnxruntime loads a file that it refuses at others."""
    if not any(row.error for row in rows):
        return ""
    loads = ", ".join(row.level for row in rows if not row.error) or "none"
    return f" Of its graph optimization levels, onnxruntime loads the file at: {loads}."


def _own_codes(runtime: Runtime | None, case: Case, model_run: Run) -> tuple[tuple[CodeRow, ...], str | None]:
    """The codes that the runtime has by its own kernels, and why there are none: it runs the file, and not with codes
    as outputs, or is large. Of a runtime that does not show them, neither.
    """
    if runtime is None or runtime.codes is None:
        return (), None
    if is_large(case.path):
        return (), f"files of more than {LARGE >> 20} MiB are not loaded again"
    try:
        parts = runtime.codes(case.path, case.feeds, also=case.keys)
    except ExportError as error:  # of the file itself, its run raises the same
        return (), next(iter(str(error).splitlines()), "")
    return tuple(compare_parts(case, model_run, parts)), None


@dataclass(kw_only=True)
class _Measured:
    """The part of a report that depends on the target."""

    runtime: str | None
    rows: tuple[KernelRow, ...] = ()
    lint: LintReport | None = None
    optimized_output_difference: float = math.nan
    outputs_within_code: float = math.nan
    latency: float = math.nan
    float_latency: float = math.nan
    integer_dot: str | None = None
    exact_output_difference: float = math.nan
    exact_by: str | None = None


def _in_target(
    runtime: Runtime | None,
    target: Target,
    case: Case,
    trained: list[np.ndarray],
    unoptimized: list[np.ndarray],
    rounds: int,
) -> _Measured:
    """What the runtime makes of the file, and its rules where it is not run here.

    Never onnxruntime's optimizer for another target unless it is asked for: it takes some of their graphs wrong.
    """
    if runtime is None:
        return _Measured(runtime=None, lint=lint_onnx(case.path, target.name))
    latency, float_latency = _latency(runtime, case, rounds)
    ran = runtime.run(case.path, case.feeds)
    if ran.outputs is None:
        return _Measured(runtime=ran.runtime, rows=ran.rows, lint=lint_onnx(case.path, target.name))
    # The codes that another runtime starts from are the reference's.
    expected = trained if ran.runtime == REFERENCE else unoptimized
    return _Measured(
        runtime=ran.runtime,
        rows=ran.rows,
        optimized_output_difference=largest_difference(ran.outputs, expected),
        outputs_within_code=within_code(ran.outputs, expected),
        latency=latency,
        float_latency=float_latency,
        integer_dot=ran.integer_dot,
        exact_output_difference=largest_difference(ran.exact_outputs, expected) if ran.exact_outputs else math.nan,
        exact_by=ran.exact_by,
    )


def _latency(runtime: Runtime, case: Case, rounds: int) -> tuple[float, float]:
    """Seconds of a run of the file, and of the float model's export; NaN where nothing is timed."""
    if runtime.latency is None or rounds == 0:
        return math.nan, math.nan
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        _export_float(case, plain)
        times = runtime.latency({"quantized": case.path, "float": plain}, case.feeds, rounds=rounds)
    return times["quantized"], times["float"]


def _export_float(case: Case, path: Path) -> None:
    """The same model without quantizers; BatchNorm is folded by the runtime."""
    edges = Edges.of(case.model, case.args, case.kwargs)
    with evaluating(case.model), in_float32(case.model), torch.no_grad():
        args, kwargs = widened((case.args, case.kwargs))
        sizes = open_batch(args, kwargs)
        gm = exported_graph(case.model, args, kwargs, sizes)
        program = to_onnx(gm, args, kwargs, sizes, 21)
        if edges is not None:
            edges.narrow(program.model.graph)
        save(program, path)
