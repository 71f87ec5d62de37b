"""`lint_onnx`: an exported graph against a target's rules, node by node, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxquant.support.table import table
from fxquant.targets.document import ModelPath, folder_of, load_model
from fxquant.targets.lint_common import COMMON
from fxquant.targets.lint_reader import LintReader, Rule, doc
from fxquant.targets.registry import get_target
from fxquant.targets.target import Target


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
    """What `lint_onnx` found in ``checked`` nodes; true when there is nothing to find.

    ``measured`` are the versions that the target's rules were seen on.
    """

    path: str
    target: str
    findings: tuple[Finding, ...]
    checked: int
    measured: str = ""

    def __bool__(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        head = f"{self.path} for {self.target}: {len(self.findings)} findings in {self.checked} nodes"
        rows = [(f.node, f.message, f.rule) for f in self.findings]
        measured = [f"rules measured on {self.measured}"] if self.measured and rows else []
        return "\n".join([head, *([table(("node", "finding", "rule"), rows)] if rows else []), *measured])


def rules(target: str) -> dict[str, str]:
    """Rule name → what it asks, for a target."""
    return {name: doc(rule) for name, rule in _rules(get_target(target)).items()}


def _rules(target: Target) -> dict[str, Rule]:
    common = {name: rule for name, rule in COMMON.items() if name not in target.lint.waived}
    return {**common, **target.lint.rules}


def lint_onnx(path: ModelPath, target: str) -> LintReport:
    """Checks the file at ``path`` against every rule of ``target``; loads it, runs nothing.

    Raises:
        InvalidArgument: unknown target. ExportError: a file that cannot be read. MissingDependency: onnx.
    """
    found = get_target(target)
    reader = LintReader(model=load_model(path), folder=folder_of(path), profile=found.profile, lint=found.lint)
    findings = [
        Finding(rule=name, node="model" if node is None else node.name or node.output[0], message=message)
        for name, rule in _rules(found).items()
        for node, message in rule(reader)
    ]
    return LintReport(
        path=str(path),
        target=target,
        findings=tuple(findings),
        checked=len(reader.nodes),
        measured=found.lint.measured,
    )
