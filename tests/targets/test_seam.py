"""A runtime is one object: a made-up one goes through every door, and no code outside asks for a target's name."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fxquant
from fxquant.__main__ import main
from fxquant.errors import InvalidArgument, MissingDependency, UnsupportedModel
from fxquant.onnx import VerifyReport, lint_onnx
from fxquant.onnx.lint import rules
from fxquant.prepared.root import plan_of
from fxquant.spec.recipes import INT4_WEIGHT_ONLY, W4A8, Recipe
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, all_nodes, load_model
from fxquant.targets.expected import ExpectedKernel, Forecast, WeightOnly
from fxquant.targets.lint_common import COMMON
from fxquant.targets.lint_reader import Breaches, Lint, LintReader, Rules
from fxquant.targets.profile import Profile
from fxquant.targets.registry import TARGETS
from fxquant.targets.target import WEIGHTED, KernelRow, Ran, Runtime, Target
from tests.house.sources import package_modules, statements
from tests.house.test_rooms import imported_names
from tests.onnx.models import calibrated

# ---------------------------------------------------------------- the runtime, as one file would hold it

RULES = Rules()


@RULES.add
def _no_relu(reader: LintReader) -> Breaches:
    """Activations are a Max: there is no Relu."""
    for node in reader.of("Relu"):
        yield node, f"{reader.profile.name} has no Relu"


def run(path: ModelPath, feeds: Feeds) -> Ran:
    """By the standard's own evaluator: every product on integers, says the name."""
    outputs = ReferenceEvaluator(onnx.load(path)).run(None, dict(feeds))
    return Ran(runtime="Wonder 1.0", rows=kernels(path), outputs=outputs, integer_dot="This is no real machine.")


def kernels(path: ModelPath, *, capability: str = "8") -> tuple[KernelRow, ...]:
    """The same rows without inputs."""
    return tuple(
        KernelRow(name=node.name, op_type=node.op_type, kernel=f"Wonder{capability}", integer=True, reason=None)
        for node in all_nodes(load_model(path).graph)
        if node.op_type in WEIGHTED
    )


def _require() -> ModuleType:
    return require("onnx")


TARGET = Target(
    profile=Profile(
        name="wonder",
        hard=frozenset({"linear"}),
        soft=frozenset(),
        symmetric=True,
        activation_bits=range(8, 9),
        weight_bits=range(4, 9),
        group_sizes=(4,),
        refused={"conv": "wonder has no convolutions"},
        highest_opset=22,
    ),
    forecast=Forecast(
        kernels={"linear": ExpectedKernel(name="Wonder {code}")},
        codes=range(5, 9),
        weight_only=WeightOnly(name="Wonder i{bits}", beside="Wonder beside"),
    ),
    lint=Lint(rules=RULES),
    runtime=Runtime(require=_require, run=run, kernels=kernels),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.conv(x).mean((2, 3)))))


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def wonder(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setitem(TARGETS, "wonder", TARGET)
    return TARGET


Exported = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model prepared for it, and its file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wonder") / "net.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "wonder", TARGET)
        model = calibrated(Net(), X, target="wonder")
        report = fxquant.export_onnx(model, (X,), path)
    assert (report.target, report.opset) == ("wonder", 21)
    return model, path


def verified(exported: Exported, monkeypatch: pytest.MonkeyPatch, runtime: Runtime | None) -> VerifyReport:
    """The report where the target is run like that."""
    monkeypatch.setitem(TARGETS, "wonder", dataclasses.replace(TARGET, runtime=runtime))
    model, path = exported
    return fxquant.verify_onnx(model, (X,), path, rounds=3)


# ---------------------------------------------------------------- its way through fxquant


def test_it_is_placed(wonder: Target) -> None:
    plan = plan_of(fxquant.prepare(Net(), (X,), target="wonder"))
    assert [(site.key, str(site.local.spec)) for site in plan.sites] == [
        ("up.input", "s8"),
        ("up.weight", "s8 axis 0"),
        ("down.input", "s8"),
        ("down.weight", "s8 axis 0"),
    ]
    assert [declined.reason for declined in plan.declined] == ["wonder has no convolutions"]


def test_it_is_trained_for(wonder: Target) -> None:
    model = fxquant.prepare(Net(), (X,), target="wonder")
    torch.compile(model, backend="fxquant_eager")(X).square().mean().backward()
    assert {row.status for row in fxquant.explain(model).rows} == {"compiled"}
    assert all(p.grad is not None for p in model.parameters())


def test_it_is_forecast(wonder: Target) -> None:
    model = fxquant.prepare(Net(), (X,), target="wonder")
    found = fxquant.explain(model, (X,))
    assert {kernel for row in found.rows for kernel in row.kernels} == {"Wonder i8"}
    assert "for wonder" in str(found) and "wonder has no convolutions" in str(found)


FOURS = dataclasses.replace(INT4_WEIGHT_ONLY.weight, group_size=4)


@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [
        (W4A8, {"float: its weight has 4-bit codes"}),
        (Recipe(name="fours", activation=None, weight=FOURS), {"Wonder i4"}),
        (Recipe(name="fours beside eights", weight=FOURS), {"Wonder beside"}),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_its_forecast_knows_widths(wonder: Target, recipe: Recipe, kernels: set[str]) -> None:
    model = fxquant.prepare(Net(), (X,), target="wonder", recipe=recipe)
    assert {kernel for row in fxquant.explain(model).rows for kernel in row.kernels} == kernels


def test_what_it_foretells_nothing_about_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "wonder", dataclasses.replace(TARGET, forecast=Forecast()))
    rows = fxquant.explain(fxquant.prepare(Net(), (X,), target="wonder")).rows
    assert {kernel for row in rows for kernel in row.kernels} == {"not known"}


def test_it_is_exported_in_its_opsets(wonder: Target, exported: Exported, tmp_path: Path) -> None:
    model, path = exported
    assert {"QuantizeLinear", "Conv"} <= {node.op_type for node in onnx.load(path).graph.node}
    path = tmp_path / "higher.onnx"
    fxquant.export_onnx(model, (X,), path, opset=22)
    assert {entry.version for entry in onnx.load(path).opset_import if not entry.domain} == {22}
    with pytest.raises(InvalidArgument, match=r"opset must be from 21 to 22 for wonder: got 23\."):
        fxquant.export_onnx(model, (X,), path, opset=23)


def test_it_is_linted_by_its_rules_and_the_common_ones(
    wonder: Target, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = exported
    assert list(rules("wonder")) == [*COMMON, "no-relu"]
    assert rules("wonder")["no-relu"] == "Activations are a Max: there is no Relu."
    report = lint_onnx(path, "wonder")
    assert [(finding.rule, finding.message) for finding in report.findings] == [("no-relu", "wonder has no Relu")]
    assert main(["lint", str(path), "--target", "wonder"]) == 1
    assert "wonder has no Relu" in capsys.readouterr().out


def test_it_is_run(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verified(exported, monkeypatch, TARGET.runtime)
    assert report.target == "wonder" and report.runtime == "Wonder 1.0" and report.lint is None
    assert [(row.op_type, row.kernel) for row in report.rows] == [
        ("Conv", "Wonder8"),
        ("MatMul", "Wonder8"),
        ("MatMul", "Wonder8"),
    ]
    assert report.integer_share == 1.0 and report.outputs_within_code == 1.0 and math.isnan(report.latency)
    assert report.optimized_output_difference < 1e-5 < report.output_spread
    text = str(report)
    assert f"{exported[1]} in Wonder 1.0" in text and text.endswith("This is no real machine.")
    assert "in onnxruntime without optimizations, Wonder 1.0's from those by" in text and "latency" not in text


def test_it_may_be_timed(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], bool, int]] = []

    def latency(paths: Mapping[str, ModelPath], feeds: Feeds, *, rounds: int) -> dict[str, float]:
        floats = {node.op_type for node in onnx.load(paths["float"]).graph.node}
        asked.append((list(feeds), "QuantizeLinear" in floats, rounds))
        return {"quantized": 0.5, "float": 2.0}

    report = verified(exported, monkeypatch, Runtime(require=_require, run=run, kernels=kernels, latency=latency))
    assert asked == [(["x"], False, 3)]
    assert (report.latency, report.float_latency, report.latency_ratio) == (0.5, 2.0, 0.25)
    assert "ratio 0.25 (below 1 is faster)" in str(report)


def test_what_differs_in_it_is_noticed(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: ModelPath, feeds: Feeds) -> Ran:
        ran = run(path, feeds)
        return dataclasses.replace(ran, outputs=[output + np.float32(1) for output in ran.outputs])

    report = verified(exported, monkeypatch, Runtime(require=_require, run=wrong, kernels=kernels))
    assert report.optimized_output_difference == pytest.approx(1.0, abs=1e-4)
    assert report.outputs_within_code == 0.0 and report.max_output_difference < 1e-5


def test_its_package_may_be_missing(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> ModuleType:
        return require("wonder_runtime", "wonder must be installed: it is not.")

    missing = Runtime(require=absent, run=run, kernels=kernels)
    with pytest.raises(MissingDependency, match=r"^wonder must be installed: it is not\.$"):
        verified(exported, monkeypatch, missing)
    report = verified(exported, monkeypatch, dataclasses.replace(missing, rules_do=True))
    assert report.runtime is None and report.lint is not None and len(report.lint.findings) == 1
    assert 'not known without `pip install "fxquant[wonder]"`' in str(report)


def test_a_runtime_that_was_asked_for_by_name_must_be_there(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> ModuleType:
        return require("wonder_runtime", "wonder must be installed: it is not.")

    runtime = Runtime(require=absent, run=run, kernels=kernels, rules_do=True)
    monkeypatch.setitem(TARGETS, "wonder", dataclasses.replace(TARGET, runtime=runtime))
    model, path = exported
    with pytest.raises(MissingDependency, match=r"^wonder must be installed: it is not\.$"):
        fxquant.verify_onnx(model, (X,), path, runtime="wonder")
    with pytest.raises(InvalidArgument, match=r"runtime must be one that runs here: got 'generic'"):
        fxquant.verify_onnx(model, (X,), path, runtime="generic")
    with pytest.raises(InvalidArgument, match=r"runtime must be one of .*: got 'abacus'"):
        fxquant.verify_onnx(model, (X,), path, runtime="abacus")


def test_a_file_may_be_run_in_the_runtime_of_another_target(
    wonder: Target, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = exported
    report = fxquant.verify_onnx(model, (X,), path, rounds=0, runtime="onnxruntime")
    assert (report.target, report.runtime) == ("wonder", "onnxruntime")
    assert report.optimized_output_difference < 1e-4 and [row.kernel for row in report.rows][1:] != ["Wonder8"] * 2


def test_it_may_be_compiled_for_a_capability(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = Runtime(require=_require, run=run, kernels=kernels, capabilities=("9", "10"))
    monkeypatch.setitem(TARGETS, "wonder", dataclasses.replace(TARGET, runtime=runtime))
    model, path = exported
    assert main(["kernels", str(path), "--target", "wonder", "--capability", "10", "--json"]) == 0
    assert {row["kernel"] for row in json.loads(capsys.readouterr().out)} == {"Wonder10"}
    with pytest.raises(InvalidArgument, match=r"^capability must be one of '9', '10' for wonder: got '8'\.$"):
        fxquant.verify_onnx(model, (X,), path, capability="8")
    with pytest.raises(InvalidArgument, match=r"^capability must be left out for onnxruntime: got '9'\.$"):
        fxquant.verify_onnx(model, (X,), path, runtime="onnxruntime", capability="9")


def test_its_kernels_are_shown(wonder: Target, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", str(exported[1]), "--target", "wonder"]) == 0
    assert capsys.readouterr().out.count("Wonder8") == 3
    assert main(["kernels", str(exported[1]), "--target", "generic"]) == 1
    assert "target must be one that runs here: got 'generic', which has rules alone" in capsys.readouterr().err


def test_without_a_run_its_rules_are_the_proof(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verified(exported, monkeypatch, None)
    assert report.runtime is None and report.rows == () and math.isnan(report.integer_share)
    assert report.lint is not None and [finding.rule for finding in report.lint.findings] == ["no-relu"]
    assert "for wonder, which is not run here: its kernels are not known" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["lint"]["target"] == "wonder"


def test_what_it_cannot_run_at_all_is_refused(wonder: Target) -> None:
    with pytest.raises(UnsupportedModel, match=r"an operator that wonder runs on integers \(linear\): found none"):
        fxquant.prepare(nn.Conv2d(3, 4, 3), (X,), target="wonder")


def test_it_is_known_only_where_it_is_registered() -> None:
    with pytest.raises(InvalidArgument, match=r"target must be one of 'onnxruntime'.*: got 'wonder'\."):
        fxquant.prepare(Net(), (X,), target="wonder")


# ---------------------------------------------------------------- nothing outside asks for a name


def names_asked_for(source: str, names: frozenset[str]) -> Iterator[int]:
    """Lines that compare something with one of ``names``, match it, or look it up in a table of them."""

    def holds(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Constant) and part.value in names for part in ast.walk(node))

    for node in ast.walk(ast.parse(source)):
        compared = isinstance(node, ast.Compare) and any(map(holds, (node.left, *node.comparators)))
        matched = isinstance(node, ast.MatchValue) and holds(node)
        begun = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
            and any(map(holds, node.args))
        )
        table = isinstance(node, ast.Dict) and any(key is not None and holds(key) for key in node.keys)
        if compared or matched or begun or table:
            yield node.lineno if not isinstance(node, ast.MatchValue) else node.value.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("if plan.target == 'openvino':\n    pass", [1]),
        ("x = 1\ny = 'tensorrt' != name", [2]),
        ("ok = name in ('generic', 'openvino')", [1]),
        ("match name:\n    case 'openvino':\n        pass", [2]),
        ("name.startswith('onnxruntime')", [1]),
        ("KERNELS = {'openvino': 1}", [1]),
        ("require('onnxruntime')\ntarget: str = 'onnxruntime'\nif target.runtime is None:\n    pass", []),
    ],
)
def test_the_rule_itself(source: str, lines: list[int]) -> None:
    assert list(names_asked_for(source, frozenset(TARGETS))) == lines


# The packages that the demo needs are called like a target.
PACKAGES = {"fxquant.shell.demo.extras"}


def test_no_code_outside_asks_for_a_target_s_name() -> None:
    asked = [
        f"{path}:{line}"
        for name, path in package_modules().items()
        if not name.startswith("fxquant.targets.") and name not in PACKAGES
        for line in names_asked_for(path.read_text(encoding="utf-8"), frozenset(TARGETS))
    ]
    assert not asked, f"give the target a field for it: {asked}"


def test_a_runtime_s_files_are_read_by_the_registry_alone() -> None:
    """And by each other."""
    readers = {}
    for name, path in package_modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, _ in statements(ast.parse(path.read_text(encoding="utf-8"))):
            for imported in imported_names(node, package):
                room, _, rest = imported.removeprefix("fxquant.").partition(".")
                runtime = next((t for t in TARGETS if rest.startswith(t)), None) if room == "targets" else None
                if runtime is not None and not name.startswith(f"fxquant.targets.{runtime}"):
                    readers.setdefault(name, set()).add(runtime)
    assert readers == {"fxquant.targets.registry": set(TARGETS)}
