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
from fxquant.errors import InvalidArgument
from fxquant.onnx.compare import Case, compare_codes, largest_difference, within_code
from fxquant.onnx.edges import Edges
from fxquant.onnx.lint import LintReport, lint_onnx
from fxquant.onnx.verify_report import VerifyReport
from fxquant.onnx.write import save, to_onnx
from fxquant.prepared.root import require_plan, unwrap
from fxquant.prepared.unset import unset_in_float
from fxquant.support.require import require
from fxquant.targets.document import ModelPath
from fxquant.targets.registry import get_target
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
) -> VerifyReport:
    """Loads the exported file and holds it to the prepared model on the given inputs.

    Runs it in onnxruntime without optimizations, which executes Q/DQ as the standard says (codes at every
    QuantizeLinear and outputs against `fxquant_eager`), then as the model's target does: in onnxruntime with all
    optimizations (outputs, kernels, and ``rounds`` timed runs against an export of the float model, on one thread,
    interleaved, medians; 0 times nothing, and exports no float model), or in OpenVINO (outputs, kernels). For tensorrt
    and generic, which are not run here, it checks the target's rules instead. Changes neither model nor file.

    Raises InvalidArgument (not prepared, no such file, inputs of another kind), ExportError (the file does not load or
    run; it quantizes activations and the model's run came by none of them), MissingDependency (onnx, onnxruntime, the
    target's runtime).
    """
    plan = require_plan(model, "verify_onnx")
    target = get_target(plan.target)
    _check(target, path)
    case = Case(model=unwrap(model), args=args, kwargs=dict(kwargs or {}), path=path)
    with unset_in_float(case.model), scaled_tables(case.model):
        compared, cascaded, trained = compare_codes(case, [site.key for site in plan.sites])
    unoptimized = run_outputs(path, case.feeds, optimize=False)
    return VerifyReport(
        path=os.fspath(path),
        target=plan.target,
        codes=tuple(compared.rows),
        not_compared=tuple(sorted(compared.not_compared)),
        input_differing_codes=compared.at_inputs,
        cascaded_codes=sum(row.differing for row in cascaded.rows),
        max_output_difference=largest_difference(unoptimized, trained),
        output_spread=float(max((value.std() for value in trained), default=0.0)),
        **vars(_in_target(target, case, trained, unoptimized, rounds)),
    )


def _check(target: Target, path: ModelPath) -> None:
    for name in ("onnx", "onnxruntime"):
        require(name)
    if target.runtime is not None:
        target.runtime.require()
    if not Path(path).is_file():
        raise InvalidArgument(f"path must be an exported ONNX file: got {os.fspath(path)!r}, which does not exist.")


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


def _in_target(
    target: Target, case: Case, trained: list[np.ndarray], unoptimized: list[np.ndarray], rounds: int
) -> _Measured:
    """What the runtime makes of the file, or its rules where it is not run here.

    Never onnxruntime's optimizer for another target: it takes some of their graphs wrong.
    """
    if target.runtime is None:
        return _Measured(runtime=None, lint=lint_onnx(case.path, target.name))
    latency, float_latency = _latency(target.runtime, case, rounds)
    ran = target.runtime.run(case.path, case.feeds)
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
