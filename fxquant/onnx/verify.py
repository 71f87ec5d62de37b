"""`verify_onnx`: the proof, by loading the artifact, that it does what training saw, as integers."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.backend.entry import fxquant_eager
from fxquant.capture.aside import compiled_aside, evaluating
from fxquant.capture.exported import exported_graph
from fxquant.errors import InvalidArgument
from fxquant.numerics import code_before_clamp, dequantize
from fxquant.onnx.export import ABSORBED, open_shapes
from fxquant.onnx.lint import LintReport, lint_onnx
from fxquant.onnx.write import save, to_onnx
from fxquant.passes.export.freeze import held_name
from fxquant.plan.plan import Role
from fxquant.prepared.root import require_plan, unwrap
from fxquant.probe.recording import record
from fxquant.support.require import require
from fxquant.support.table import table
from fxquant.targets.document import Wiring, load_model
from fxquant.targets.kernels import KernelRow, kernel_rows
from fxquant.targets.openvino_run import require_openvino, run_openvino
from fxquant.targets.session import integer_dot_support, latency, run_codes, run_outputs, session

if TYPE_CHECKING:
    import numpy as np

_ONNXRUNTIME = "onnxruntime"
_PLAIN = "onnxruntime without optimizations"


@dataclass(frozen=True, kw_only=True)
class CodeRow:
    """Codes of one QuantizeLinear: how many differ from training's, and by how much at most."""

    key: str
    differing: int
    compared: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_onnx` measured. A number that was not measured is NaN (None in `to_dict`).

    Attributes:
        target: what the model was prepared for; `runtime`: what ran the file besides onnxruntime without
            optimizations, None where the target cannot run here (tensorrt, generic).
        rows: every Conv, Gemm and MatMul of the file with the kernel it became; empty without a runtime.
        integer_share: the part of those rows that runs on integers.
        lint: the target's rules on the file, where no runtime tells.
        codes: per QuantizeLinear, onnxruntime without optimizations against `fxquant_eager`, each site computed from
            the codes that onnxruntime had before it: what differs, differs because of the kernels in between.
        differing_codes, compared_codes, largest_code_difference: the same, summed up.
        input_differing_codes: of those, at QuantizeLinear nodes that read a graph input.
        cascaded_codes: codes that differ when each side goes on from its own: one float that rounds to the other side
            early in a deep net moves many codes behind it.
        max_output_difference: largest difference of an output, onnxruntime without optimizations.
        optimized_output_difference: the same of the runtime; OpenVINO is compared with onnxruntime without
            optimizations, whose codes it starts from.
        outputs_within_code: of the same two, the share of output values that lie within one 8-bit code of each other:
            1/255 of the range of their output.
        output_spread: standard deviation of the reference's outputs, to judge those two by.
        latency, float_latency: median seconds of a run, of this file and of the float model's export; in onnxruntime.
        integer_dot: None, or why integer speed is not to be expected on this CPU.
    """

    path: str
    target: str
    runtime: str | None
    rows: tuple[KernelRow, ...]
    lint: LintReport | None
    codes: tuple[CodeRow, ...]
    input_differing_codes: int
    cascaded_codes: int
    max_output_difference: float
    optimized_output_difference: float
    outputs_within_code: float
    output_spread: float
    latency: float
    float_latency: float
    integer_dot: str | None

    @property
    def integer_share(self) -> float:
        """Integer kernels over all Conv, Gemm and MatMul nodes; 1 where there are none, NaN without a runtime."""
        if self.runtime is None:
            return math.nan
        return sum(row.integer for row in self.rows) / len(self.rows) if self.rows else 1.0

    @property
    def differing_codes(self) -> int:
        """Codes that differ, over every QuantizeLinear."""
        return sum(row.differing for row in self.codes)

    @property
    def compared_codes(self) -> int:
        """Codes that were compared."""
        return sum(row.compared for row in self.codes)

    @property
    def largest_code_difference(self) -> int:
        """The largest distance of a code from training's."""
        return max((row.largest for row in self.codes), default=0)

    @property
    def latency_ratio(self) -> float:
        """Time of a run over that of the float model: below 1 is faster."""
        return self.latency / self.float_latency

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the sums included."""
        sums = ("integer_share", "differing_codes", "compared_codes", "largest_code_difference", "latency_ratio")
        fields = {**vars(self), **{name: getattr(self, name) for name in sums}}
        measured = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}
        return {
            **measured,
            "rows": [vars(row) for row in self.rows],
            "codes": [vars(row) for row in self.codes],
            "lint": None if self.lint is None else self.lint.to_dict(),
        }

    def __str__(self) -> str:
        codes = (
            f"{self.differing_codes} of {self.compared_codes} codes differ from fxquant_eager "
            f"({self.input_differing_codes} at inputs, by {self.largest_code_difference} at most); "
            f"{self.cascaded_codes} when differences run on through the net"
        )
        off = [(c.key, c.differing, c.compared, c.largest) for c in self.codes if c.differing]
        lines = [
            *self._kernel_lines(),
            codes if self.runtime == _ONNXRUNTIME else f"in {_PLAIN}, {codes}",
            *([table(("site", "differ", "of", "largest"), off)] if off else []),
            self._output_line(),
            *([self._latency_line()] if not math.isnan(self.latency) else []),
            *([self.integer_dot] if self.integer_dot else []),
        ]
        return "\n".join(lines)

    def _kernel_lines(self) -> list[str]:
        if self.runtime is None:
            unknown = f"{self.path} for {self.target}, which is not run here: its kernels are not known"
            return [unknown, *([str(self.lint)] if self.lint is not None else [])]
        rows = [(r.name, r.op_type, r.kernel, "yes" if r.integer else "no", r.reason or "") for r in self.rows]
        share = f"{sum(r.integer for r in self.rows)} of {len(self.rows)} conv/gemm/matmul nodes run on integers"
        return [
            f"{self.path} in {self.runtime}",
            table(("node", "op", "kernel", "integer", "why not"), rows),
            f"{share} ({100 * self.integer_share:.1f} %)",
        ]

    def _output_line(self) -> str:
        spread, plain = f"(spread {self.output_spread:.3g})", f"outputs differ by {self.max_output_difference:.3g}"
        if self.runtime is None:
            return f"{plain} in {_PLAIN} {spread}"
        if self.runtime == _ONNXRUNTIME:
            both = f"{plain} unoptimized, {self.optimized_output_difference:.3g} optimized {spread}"
        else:
            apart = f"{self.runtime}'s from those by {self.optimized_output_difference:.3g}"
            both = f"{plain} in {_PLAIN}, {apart} {spread}"
        return f"{both}; {100 * self.outputs_within_code:.4g} % of them by an 8-bit code at most"

    def _latency_line(self) -> str:
        return (
            f"latency {1e3 * self.latency:.3f} ms, float {1e3 * self.float_latency:.3f} ms: "
            f"ratio {self.latency_ratio:.2f} (below 1 is faster)"
        )


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
    interleaved, medians), or in OpenVINO (outputs, kernels). For tensorrt and generic, which are not run here, it
    checks the target's rules instead. Changes neither model nor file.

    Raises InvalidArgument (not prepared, no such file, inputs of another kind), ExportError (the file does not
    load or run), MissingDependency (onnx, onnxruntime; openvino for that target).
    """
    plan = require_plan(model, "verify_onnx")
    for name in ("onnx", "onnxruntime"):
        require(name)
    if plan.target == "openvino":
        require_openvino()
    if not Path(path).is_file():
        raise InvalidArgument(f"path must be an exported ONNX file: got {os.fspath(path)!r}, which does not exist.")
    plain, kwargs = unwrap(model), dict(kwargs or {})
    feeds = _feeds(path, args, kwargs)
    absorbed = _absorbed_codes(path)
    found = run_codes(path, feeds, also=[site.key for site in plan.sites])
    found |= {key: codes for key, codes in absorbed.items() if codes is not None}
    cascaded = _compare_codes(plain, args, kwargs, found, follow=False)
    _check_sites(path, cascaded.unknown - absorbed.keys())
    compared = _compare_codes(plain, args, kwargs, found, follow=True)
    with evaluating(plain), torch.no_grad(), compiled_aside(plain, fxquant_eager, dynamic=False) as run:
        reference = run(*args, **kwargs)
    flat = [_array(t) for t in torch.utils._pytree.tree_leaves(reference) if isinstance(t, Tensor)]
    unoptimized = run_outputs(path, feeds, optimize=False)
    if plan.target == "onnxruntime":
        ran = _in_onnxruntime(plain, args, kwargs, path, feeds, flat, rounds)
    else:
        ran = _elsewhere(plan.target, path, feeds, unoptimized)
    return VerifyReport(
        path=os.fspath(path),
        target=plan.target,
        codes=tuple(compared.rows),
        input_differing_codes=compared.at_inputs,
        cascaded_codes=sum(row.differing for row in cascaded.rows),
        max_output_difference=_largest(unoptimized, flat),
        output_spread=float(max((value.std() for value in flat), default=0.0)),
        **vars(ran),
    )


@dataclass(kw_only=True)
class _Ran:
    """The part of a report that depends on the target."""

    runtime: str | None
    rows: tuple[KernelRow, ...] = ()
    lint: LintReport | None = None
    optimized_output_difference: float = math.nan
    outputs_within_code: float = math.nan
    latency: float = math.nan
    float_latency: float = math.nan
    integer_dot: str | None = None


def _in_onnxruntime(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str | os.PathLike[str],
    feeds: dict[str, np.ndarray],
    reference: list[np.ndarray],
    rounds: int,
) -> _Ran:
    with tempfile.TemporaryDirectory() as folder:
        float_path = Path(folder) / "float.onnx"
        _export_float(model, args, kwargs, float_path)
        times = latency({"quantized": path, "float": float_path}, feeds, rounds=rounds)
    outputs = run_outputs(path, feeds, optimize=True)
    return _Ran(
        runtime=_ONNXRUNTIME,
        rows=kernel_rows(path),
        optimized_output_difference=_largest(outputs, reference),
        outputs_within_code=_within_code(outputs, reference),
        latency=times["quantized"],
        float_latency=times["float"],
        integer_dot=integer_dot_support(),
    )


def _elsewhere(
    target: str, path: str | os.PathLike[str], feeds: dict[str, np.ndarray], unoptimized: list[np.ndarray]
) -> _Ran:
    """OpenVINO, or no runtime. Never onnxruntime's optimizer, which takes some other targets' graphs wrong."""
    if target != "openvino":
        return _Ran(runtime=None, lint=lint_onnx(path, target))
    ran = run_openvino(path, feeds)
    return _Ran(
        runtime=f"OpenVINO {ran.version}",
        rows=ran.rows,
        optimized_output_difference=_largest(ran.outputs, unoptimized),
        outputs_within_code=_within_code(ran.outputs, unoptimized),
        integer_dot=integer_dot_support(),
    )


def _feeds(path: str | os.PathLike[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Graph inputs by name; the exporter flattens arguments in order."""
    names = [i.name for i in session(path, optimize=False).get_inputs()]
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if len(names) != len(leaves):
        raise InvalidArgument(
            f"args and kwargs must hold the file's {len(names)} inputs ({', '.join(names)}): got {len(leaves)} tensors."
        )
    return {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}


def _absorbed_codes(path: str | os.PathLike[str]) -> dict[str, np.ndarray | None]:
    """Codes of the sites that are constants in the file; None for those that are a part of another one."""
    model = load_model(path)
    listed = next((p.value for p in model.metadata_props if p.key == ABSORBED), "[]")
    held = Wiring(model=model, folder=os.fspath(Path(path).absolute().parent)).initializers
    tensors = {key: held.get(held_name(f"{key}.codes")) for key in json.loads(listed)}
    to_array = require("onnx.numpy_helper").to_array
    return {key: None if tensor is None else to_array(tensor) for key, tensor in tensors.items()}


def _check_sites(path: str | os.PathLike[str], absent: Set[str]) -> None:
    if absent:
        raise InvalidArgument(
            f"{os.fspath(path)} must be an export of this model: it has no QuantizeLinear for "
            f"{', '.join(sorted(absent)[:5])}. Export the model again."
        )


@dataclass
class _Comparison:
    """Rows per site, codes that differ at the model's inputs, and sites that the file does not know."""

    rows: list[CodeRow] = field(default_factory=list)
    at_inputs: int = 0
    unknown: set[str] = field(default_factory=set)


def _compare_codes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Mapping[str, np.ndarray],
    *,
    follow: bool,
) -> _Comparison:
    """Evaluates the model and compares every site; ``follow``: each goes on from onnxruntime's codes."""
    result = _Comparison()
    inputs = {t.data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

    def visit(key: str, role: Role, x: Tensor, scale: Tensor, zero_point: Tensor, y: Tensor) -> Tensor | None:
        if role == "weight":
            return None
        if key not in found:
            result.unknown.add(key)
            return None
        theirs = torch.from_numpy(found[key].astype("int64")).reshape(y.shape)
        ours = code_before_clamp(y, scale, zero_point, "divide").to(torch.int64)
        distance = (theirs - ours).abs()
        differing = int((distance > 0).sum())
        largest = int(distance.max()) if distance.numel() else 0
        result.rows.append(CodeRow(key=key, differing=differing, compared=distance.numel(), largest=largest))
        result.at_inputs += differing if x.data_ptr() in inputs else 0
        if not (follow and differing):
            return None
        return torch.empty_like(y).copy_(dequantize(theirs, scale, zero_point))  # in y's strides, which views rely on

    record(model, args, kwargs, visit)
    return result


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16


def _largest(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    import numpy as np

    return max((float(np.abs(f - r).max(initial=0)) for f, r in zip(found, reference, strict=True)), default=0.0)


def _within_code(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    import numpy as np

    close = total = 0
    for f, r in zip(found, reference, strict=True):
        if r.size and r.dtype.kind == "f":
            finite = r[np.isfinite(r)]  # masks put -inf there
            step = np.ptp(finite) / 255 if finite.size else 0.0
            with np.errstate(invalid="ignore"):  # inf − inf
                close += int(((f == r) | (np.abs(f - r) <= step)).sum())
            total += r.size
    return close / total if total else 1.0


def _export_float(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    """The same model without quantizers, for the latency that it is compared with; BatchNorm folded by onnxruntime."""
    with evaluating(model), torch.no_grad():
        shapes = open_shapes(model, args, kwargs)
        gm = exported_graph(model, args, kwargs, shapes)
        save(to_onnx(gm, args, kwargs, shapes, 21), path)
