"""What `verify_onnx` measured, and how it prints."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fxquant.onnx.lint import LintReport
from fxquant.support.table import table
from fxquant.targets.registry import get_target
from fxquant.targets.session import REFERENCE
from fxquant.targets.target import KernelRow

PLAIN = f"{REFERENCE} without optimizations"
_WITHIN = 0.999  # of the outputs, where codes are not compared
_NOTED = 0.001  # of a site's codes in another runtime, whose sums are of another order


@dataclass(frozen=True, kw_only=True)
class CodeRow:
    """Codes of one QuantizeLinear: how many differ from training's, and by how much at most."""

    key: str
    differing: int
    compared: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class LevelRow:
    """A file at one graph optimization level of onnxruntime.

    Attributes:
        error: why it does not load or run there; None where it does.
        differing, compared, largest: codes against training's, each site from the codes that the level gave before it.
            None where they were not compared: the file is large, or has none.
        outputs_within_code: the share of output values within one 8-bit code of those without optimizations; None
            where there are none.
    """

    level: str
    error: str | None = None
    differing: int | None = None
    compared: int | None = None
    largest: int | None = None
    outputs_within_code: float | None = None

    @property
    def holds(self) -> bool:
        """Loads, and its codes are within the contract of docs/numerics.md: one in 10,000 is off, by one."""
        if self.error is not None:
            return False
        if self.differing is None or self.compared is None or self.largest is None:
            return self.outputs_within_code is not None and self.outputs_within_code >= _WITHIN
        return self.largest <= 1 and self.differing <= max(1, self.compared // 10_000)

    def __str__(self) -> str:
        if self.error is not None:
            return f"level {self.level!r} does not run: {self.error}"
        outputs = f"{100 * (self.outputs_within_code or 0.0):.4g} % of the outputs within an 8-bit code"
        if self.differing is None:
            return f"level {self.level!r}: {outputs}"
        return f"level {self.level!r}: {self.differing} of {self.compared} codes differ, by {self.largest}; {outputs}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify_onnx` measured. A number that was not measured is NaN (None in `to_dict`).

    Attributes:
        target: what the model was prepared for; `runtime`: what ran the file besides onnxruntime without
            optimizations, or built it; None where its rules are all there is (generic, tensorrt not installed).
        rows: every Conv, Gemm and MatMul of the file with the kernel it became; empty without a runtime.
        integer_share: the part of those rows that runs on integers.
        lint: the target's rules on the file, where no kernel ran.
        codes: per QuantizeLinear, onnxruntime without optimizations against `fxquant_eager`, each site computed from
            the codes that onnxruntime had before it: what differs, differs because of the kernels in between.
        not_compared: sites that the file quantizes and the model's run did not come by, or in another form: some
            models take another way when they are exported.
        differing_codes, compared_codes, largest_code_difference: the same, summed up.
        input_differing_codes: of those, at QuantizeLinear nodes that read a graph input.
        cascaded_codes: codes that differ when each side goes on from its own: one float that rounds to the other side
            early in a deep net moves many codes after it.
        max_output_difference: largest difference of an output, onnxruntime without optimizations.
        optimized_output_difference: the same of the runtime; OpenVINO is compared with onnxruntime without
            optimizations, whose codes it starts from.
        outputs_within_code: of the same two, the share of output values that lie within one 8-bit code of each other:
            1/255 of the range of their output.
        output_spread: standard deviation of the reference's outputs, to judge those two by.
        latency, float_latency: median seconds of CPU time of a run on one thread, of this file and of the float model's
            export; in onnxruntime.
        integer_dot: None, or why integer speed is not to be expected on this CPU.
        exact_output_difference: on a CPU whose 8-bit sums saturate, `optimized_output_difference` with the setting
            ``exact_by`` of the runtime, which sums exactly; NaN on others, and where the file does not load so.
        runtime_codes: as ``codes``, in the runtime, where it is OpenVINO: each read in a run that does not show
            what it is computed from, so that no fusion hides, but for nets whose layers each read more than three
            others. Empty for other runtimes, and for files of more than 256 MiB.
        runtime_codes_error: why they were not read of a file that runs; None where they were.
        levels: the file at every graph optimization level that the installed onnxruntime has; empty where it has no
            kernels for the file as it is.
        roundings: how training rounds activations, ``"divide"`` or ``"reciprocal"``; by the plan, of any version.
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
    not_compared: tuple[str, ...] = ()
    roundings: tuple[str, ...] = ()
    exact_output_difference: float = math.nan
    exact_by: str | None = None
    levels: tuple[LevelRow, ...] = ()
    runtime_codes: tuple[CodeRow, ...] = ()
    runtime_codes_error: str | None = None

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
            "runtime_codes": [vars(row) for row in self.runtime_codes],
            "levels": [{**vars(row), "holds": row.holds} for row in self.levels],
            "lint": None if self.lint is None else self.lint.to_dict(),
        }

    def __str__(self) -> str:
        codes = "no activation is quantized: there are no codes to compare"
        if self.codes or self.not_compared:
            codes = (
                f"{self.differing_codes} of {self.compared_codes} codes differ from fxquant_eager "
                f"({self.input_differing_codes} at inputs, by {self.largest_code_difference} at most); "
                f"{self.cascaded_codes} when differences run on through the net"
            )
        if get_target(self.target).profile.rounding == "reciprocal" and self.roundings:
            trained = ", and so does training, where onnxruntime divides"
            if "divide" in self.roundings:
                trained = ", where training and onnxruntime divide: it may differ by a code"
            codes += f"; {self.target} multiplies by 1 / scale{trained}"
        lines = [
            *self._kernel_lines(),
            codes if self.runtime == REFERENCE else f"in {PLAIN}, {codes}",
            *_differing(self.codes),
            *self._runtime_code_lines(),
            *self._not_compared_lines(),
            self._output_line(),
            *self._other_model_lines(),
            *self._saturation_lines(),
            *self._level_lines(),
            *([self._latency_line()] if not math.isnan(self.latency) else []),
            *([self.integer_dot] if self.integer_dot else []),
        ]
        return "\n".join(lines)

    def _kernel_lines(self) -> list[str]:
        if self.runtime is None:
            unknown = f"{self.path} for {self.target}, which is not run here: its kernels are not known"
            runtime = get_target(self.target).runtime
            if runtime is not None:
                unknown += f' without `pip install "fxquant[{self.target}]"`'
            return [unknown, *([str(self.lint)] if self.lint is not None else [])]
        rows = [(r.name, r.op_type, r.kernel, "yes" if r.integer else "no", r.reason or "") for r in self.rows]
        kinds = [kind for kind in ("fp8", "fp4") if any(r.integer and kind in r.kernel for r in self.rows)]
        codes = f"codes ({', '.join(kinds)})" if kinds else "integers"
        share = f"{sum(r.integer for r in self.rows)} of {len(self.rows)} conv/gemm/matmul nodes run on {codes}"
        return [
            f"{self.path} in {self.runtime}",
            table(("node", "op", "kernel", "integer", "why not"), rows),
            f"{share} ({100 * self.integer_share:.1f} %)",
            *([str(self.lint)] if self.lint is not None else []),
        ]

    def _runtime_code_lines(self) -> list[str]:
        if self.runtime_codes_error is not None:
            return [f"the codes that {self.runtime} itself has were not read: {self.runtime_codes_error}"]
        if not self.runtime_codes:
            return []
        count, compared = (sum(getattr(row, n) for row in self.runtime_codes) for n in ("differing", "compared"))
        largest = max(row.largest for row in self.runtime_codes)
        told = f"{count} of {compared} codes differ from fxquant_eager (by {largest} at most)"
        return [f"in {self.runtime} itself, {told}", *_differing(self.runtime_codes, least=_NOTED)]

    def _not_compared_lines(self) -> list[str]:
        names, count = ", ".join(self.not_compared), len(self.not_compared)
        why = "as the model runs them in another form"
        return [f"{count} sites of the file were not compared, {why}: {names}"] if names else []

    def _level_lines(self) -> list[str]:
        lines = []
        for what, of_codes in (("codes are training's", True), ("outputs are those without optimizations", False)):
            held = [row.level for row in self.levels if row.holds and bool(row.compared) == of_codes]
            lines += [f"{what} in {REFERENCE} at the levels {', '.join(held)}"] if held else []
        return [*lines, *(f"{REFERENCE}, {row}" for row in self.levels if not row.holds)]

    def _output_line(self) -> str:
        spread, plain = f"(spread {self.output_spread:.3g})", f"outputs differ by {self.max_output_difference:.3g}"
        if math.isnan(self.optimized_output_difference):
            return f"{plain} in {PLAIN} {spread}"
        if self.runtime == REFERENCE:
            both = f"{plain} unoptimized, {self.optimized_output_difference:.3g} optimized {spread}"
        else:
            apart = f"{self.runtime}'s from those by {self.optimized_output_difference:.3g}"
            both = f"{plain} in {PLAIN}, {apart} {spread}"
        return f"{both}; {100 * self.outputs_within_code:.4g} % of them by an 8-bit code at most"

    def _other_model_lines(self) -> list[str]:
        """Codes are compared from the file's own on: those of another model with the same sites can all be right."""
        if not self.max_output_difference > self.output_spread > 0:
            return []
        return ["the outputs are further from the model's than they vary: was the file exported from it, as it is now?"]

    def _saturation_lines(self) -> list[str]:
        exact = self.exact_output_difference
        if self.exact_by is None or exact == self.optimized_output_difference:
            return []
        if math.isnan(exact):
            return [f"whether sums of 8-bit products saturated is unknown: the file does not load with {self.exact_by}"]
        return [f"sums of 8-bit products saturated on this CPU: with {self.exact_by}, outputs differ by {exact:.3g}"]

    def _latency_line(self) -> str:
        return (
            f"latency {1e3 * self.latency:.3f} ms, float {1e3 * self.float_latency:.3f} ms: "
            f"ratio {self.latency_ratio:.2f} (below 1 is faster)"
        )


def _differing(rows: Collection[CodeRow], least: float = 0.0) -> list[str]:
    """A table of the sites where more than ``least`` of the codes differ; nothing where none do."""
    off = [(row.key, row.differing, row.compared, row.largest) for row in rows if row.differing > least * row.compared]
    return [table(("site", "differ", "of", "largest"), off)] if off else []
