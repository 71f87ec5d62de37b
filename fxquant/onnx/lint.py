"""`lint_onnx`: an exported graph against a target's rules, node by node, without running it.

The rules for all targets are what any consumer of QuantizeLinear / DequantizeLinear needs; those of TensorRT come
from its documents and the sources of its ONNX parser, since it cannot be installed everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.support.table import table
from fxquant.targets import lint_tensorrt  # noqa: F401  (registers its rules)
from fxquant.targets.document import ModelPath, load_model
from fxquant.targets.lint_rules import Reader, doc, rules_of
from fxquant.targets.profiles import get_profile


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A node that breaks a rule."""

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message} [{self.rule}]"


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """What `lint_onnx` found in ``checked`` nodes; true when there is nothing to find."""

    path: str
    target: str
    findings: tuple[Finding, ...]
    checked: int

    def __bool__(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        head = f"{self.path} for {self.target}: {len(self.findings)} findings in {self.checked} nodes"
        rows = [(f.node, f.message, f.rule) for f in self.findings]
        return "\n".join([head, table(("node", "finding", "rule"), rows)] if rows else [head])


def rules(target: str) -> dict[str, str]:
    """Rule name → what it asks, for a target."""
    return {name: doc(rule) for name, rule in rules_of(get_profile(target).name).items()}


def lint_onnx(path: ModelPath, target: str) -> LintReport:
    """Checks the file at ``path`` against every rule of ``target``; loads it, runs nothing.

    Raises:
        InvalidArgument: unknown target. ExportError: a file that cannot be read. MissingDependency: onnx.
    """
    profile = get_profile(target)
    reader = Reader(model=load_model(path), folder=str(Path(path).absolute().parent), profile=profile)
    findings = [
        Finding(rule=name, node="model" if node is None else node.name or node.output[0], message=message)
        for name, rule in rules_of(target).items()
        for node, message in rule(reader)
    ]
    return LintReport(path=str(path), target=target, findings=tuple(findings), checked=len(reader.nodes))
