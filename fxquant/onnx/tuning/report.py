"""What `tune_onnx` measured, what it recommends, and how that is applied in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxquant.onnx.tuning.rules import written
from fxquant.spec.rules import Rule
from fxquant.support.table import table


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One product of the file that reads codes.

    Attributes:
        name: the node's name; module: the module of the model that it comes from, where the file says it.
        shape: of its operands, in words.
        integer, plain: seconds of the layer by itself, as integers and in float, without the quantizing around it.
        effect: seconds that a run of the recommended file would take longer with this layer the other way; below 0:
            less. Of layers of one class, which were measured together, an equal share each.
        noise: the part of ``effect`` that may be noise.
        is_float: whether to leave it in float.
        reason: why.
    """

    name: str
    module: str | None
    op_type: str
    shape: str
    integer: float
    plain: float
    effect: float
    noise: float
    is_float: bool
    reason: str

    @property
    def gain(self) -> float:
        """How many times as fast as its integer kernel the float one is, by itself."""
        return self.integer / self.plain


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What to leave in float, measured on this machine.

    Attributes:
        runtime: its name and version; ``cpu``, ``threads``, ``inputs``: where and on what it ran.
        clock: "CPU time" of the process, or "wall time".
        rows: a row per layer, in the file's order.
        along: other operators that are float with them, as their operands are no codes any more.
        left_alone: products that were not looked at, and why.
        before, after, plain: median seconds of a run of the given file, of the recommended one (of the given one where
            nothing is recommended) and of the file with all layers float, interleaved. ``plain`` is not the float
            model's export: quantizers and table look-ups that belong to no layer stay.
        integer_dot: None, or why integer speed is not to be expected on this CPU.
        rules, override: what `fxquant.prepare` and `fxquant.override` take, of a file that `fxquant.export_onnx` wrote.
        unknown: recommended layers that the file does not say the module of, by node name.
        output: the tuned file, where it was asked for.
    """

    path: str
    runtime: str
    cpu: str
    threads: int
    rounds: int
    clock: str
    inputs: str
    rows: tuple[LayerRow, ...]
    along: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    before: float
    after: float
    plain: float
    integer_dot: str | None
    rules: tuple[Rule, ...]
    override: tuple[str, ...]
    unknown: tuple[str, ...]
    output: str | None

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of the nodes to leave in float."""
        return tuple(row.name for row in self.rows if row.is_float)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; each of ``rules`` holds what `fxquant.skip` takes."""
        named = [
            {name: value for name in ("path", "kind", "operand") if (value := getattr(rule, name)) is not None}
            for rule in self.rules
        ]
        rows = [{**vars(row), "gain": row.gain} for row in self.rows]
        return {**vars(self), "floats": list(self.floats), "rows": rows, "rules": named}

    def __str__(self) -> str:
        cells = [
            (
                row.name if row.module is None else row.module or "the model itself",
                row.op_type,
                row.shape,
                f"{1e3 * row.integer:.3f}",
                f"{1e3 * row.plain:.3f}",
                f"{row.gain:.2f}",
                f"{1e3 * row.effect:+.3f} ± {1e3 * row.noise:.3f}",
                "float" if row.is_float else "integer",
            )
            for row in self.rows
        ]
        header = ("layer", "op", "shape", "integer ms", "float ms", "ratio", "the other way ms", "decision")
        lines = [
            f"{self.path} in {self.runtime}, {self.cpu}, {_counted(self.threads, 'thread')}; {self.inputs}; "
            f"{self.clock}, medians of {self.rounds} interleaved rounds",
            table(header, cells),
            "integer, float: the layer by itself. The other way: what that adds to a run of the file as recommended.",
            *(f"left alone: {name}: {why}" for name, why in self.left_alone),
            *self._totals(),
            *([self.integer_dot] if self.integer_dot else []),
            *self._how(),
        ]
        return "\n".join(lines)

    def _totals(self) -> list[str]:
        before, plain = f"{1e3 * self.before:.3f} ms", f"{1e3 * self.plain:.3f} ms with all layers float"
        if not self.floats:
            return [f"the file as it is: {before} ({plain}). No choice of float layers is faster: leave it as it is."]
        along = f", and {_counted(len(self.along), 'operator')} between them" if self.along else ""
        return [
            f"before {before}, after {1e3 * self.after:.3f} ms ({self.before / self.after:.2f} times as fast; {plain})",
            f"leave {len(self.floats)} of {_counted(len(self.rows), 'layer')} in float{along}"
        ]

    def _how(self) -> list[str]:
        lines = []
        if len(self.floats) == len(self.rows):
            lines += ["no layer pays as integers here: deploy the float model, or tune on the machine that it is for"]
        elif self.rules:
            rules = "".join(f"    {written(rule)},\n" for rule in self.rules)
            lines += [f"train with\n\nrules = [\n{rules}]\nfxquant.prepare(model, args, rules=rules)\n"]
        if self.override:
            sites = "".join(f"    {key!r}: None,\n" for key in self.override)
            lines += [f"and after prepare\n\nfxquant.override(model, {{\n{sites}}})\n"]
        if self.unknown:
            names = "".join(f"    {name!r},\n" for name in self.unknown)
            lines += [
                "the file does not say which modules these nodes come from; leave them out in the tool that made it "
                f"(nodes_to_exclude of onnxruntime's quantize_static)\n\n[\n{names}]\n"
            ]
        if self.output:
            what = "with these layers float" if self.floats else "a copy of the file"
            lines += [f"{self.output}: {what}"]
        return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
