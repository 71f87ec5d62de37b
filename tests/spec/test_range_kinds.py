"""A kind of range is one file: two made-up ones go all the way, and nothing else in fxquant names a kind."""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import InvalidArgument, NotQuantizedWarning, PlanMismatch, RangeNotSet
from fxquant.plan.plan import Edge, LocalSite, Plan
from fxquant.plan.site_lists import digest
from fxquant.prepared.quantizer import Quantizer, quantizers
from fxquant.prepared.root import plan_of
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor, Fixed, MovingAverage, Qparams, Range, SiteGraph
from tests.house.sources import ROOT
from tests.onnx.agreement import assert_codes_agree
from tests.spec.made_up_ranges import Learned, Peak

EAGER = "fxquant_eager"
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def prepared(found: Range) -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(Net(), (X,), ranges=found)


def held(model: nn.Module, key: str = "up.input") -> Quantizer:
    return dict(quantizers(model))[key]


def trained(found: Range, backend: str = EAGER, rate: float = 0.1) -> tuple[nn.Module, list[Tensor]]:
    """Three steps of SGD, and their results."""
    model = prepared(found)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    compiled, outs = torch.compile(model, backend=backend), []
    for factor in (1.0, 3.0, 0.5):
        optimizer.zero_grad()
        outs.append(compiled(X * factor))
        outs[-1].square().mean().backward()
        optimizer.step()
    return model, outs


def fake(x: Tensor, scale: Tensor, point: int = 128) -> Tensor:
    return ((x / scale).round().add(point).clamp(0, 255) - point) * scale


def weight(w: Tensor) -> Tensor:
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round().clamp(-127, 127) * scale


# A rule of its own


def test_a_state_moves_by_its_own_rule() -> None:
    model, _ = trained(Peak(decay=0.5))
    expected = torch.tensor(0.0)
    for factor in (1.0, 3.0, 0.5):
        expected = torch.maximum(0.5 * expected, (X * factor).abs().max())
    assert held(model).amax == expected and list(held(model).state_dict()) == ["amax"]
    out = torch.compile(model.eval(), backend=EAGER)(X)
    assert held(model).amax == expected
    inner = torch.relu(nn.functional.linear(fake(X, 2 * expected / 255), weight(model.up.weight), model.up.bias))
    reach = held(model, "down.input").amax
    final = nn.functional.linear(fake(inner, 2 * reach / 255), weight(model.down.weight), model.down.bias)
    torch.testing.assert_close(out, final, rtol=1e-5, atol=1e-5)


def test_an_unset_state_resolves_and_is_told() -> None:
    model = prepared(Peak())
    assert [row.range for row in fxquant.explain(model).rows] == ["unset", "of the tensor"] * 2
    assert held(model).mode(False) is Mode.RESOLVE
    out = torch.compile(model.eval(), backend=EAGER)(X)
    assert out.isfinite().all() and held(model).amax < 0
    with pytest.raises(RangeNotSet, match=r"saw no data yet: up\.input, down\.input"):
        fxquant.export_onnx(model, (X,), "never.onnx")
    with pytest.raises(RangeNotSet, match="must be given a model whose ranges are set"):
        fxquant.sensitivity(model, [X], progress=False)


def test_what_saw_only_zeros_is_degenerate(tmp_path: Path) -> None:
    model = prepared(Peak())
    fxquant.calibrate(model, [torch.zeros_like(X)], progress=False)
    with pytest.warns(
        NotQuantizedWarning, match=r"1 sites saw only zeros, and whatever comes in stays 0 .*: up\.input"
    ):
        report = fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    assert "up.input" in report.activations and "1 sites saw only zeros" in report.notes[0]


# A trained state


def test_a_parameter_receives_the_gradient_of_its_scale() -> None:
    model = prepared(Learned(start=1.0))
    assert "up.quantizers.input.reach" in dict(model.named_parameters())
    torch.compile(model, backend=EAGER)(X).sum().backward()
    reach, steps = held(model).reach, 2 / 255
    scale = reach.detach().double() * steps
    codes = (X / scale).round() + 128
    assert (codes < 0).any() and (codes > 255).any() and ((codes > 0) & (codes < 255)).any()
    slope = torch.where(codes < 0, -128.0, torch.where(codes > 255, 127.0, (X / scale).round() - X / scale))
    hidden = nn.functional.linear(fake(X, scale.float()), weight(model.up.weight), model.up.bias).detach()
    second = held(model, "down.input").reach.detach() * steps
    passes = ((hidden.relu() / second).round() + 128 <= 255) & (hidden > 0)
    upstream = (weight(model.down.weight).sum(0) * passes) @ weight(model.up.weight)
    torch.testing.assert_close(reach.grad, (upstream * slope).sum().mul(steps).float().reshape(1), rtol=1e-4, atol=1e-4)


def test_a_frozen_or_evaluated_parameter_receives_none() -> None:
    model = prepared(Learned())
    fxquant.freeze_ranges(model)
    torch.compile(model, backend=EAGER)(X).sum().backward()
    assert held(model).reach.grad is None and model.up.weight.grad is not None
    fxquant.freeze_ranges(model, frozen=False)
    torch.compile(model, backend=EAGER)(X).sum().backward()
    assert held(model).reach.grad is not None


def test_a_parameter_stays_float32_under_half() -> None:
    model, _ = trained(Learned(start=1.0 / 3))
    before = held(model).reach.clone()
    parameter = held(model).reach
    assert model.half().up.weight.dtype == torch.float16
    assert held(model).reach is parameter and parameter.dtype == torch.float32 and torch.equal(parameter, before)


# All the way, both


@pytest.mark.parametrize("found", [Peak(decay=0.9), Learned(start=1.5)], ids=lambda r: r.kind)
def test_compiled_trains_as_eager_does(found: Range) -> None:
    (model, outs), (twin, expected) = trained(found, "fxquant"), trained(found)
    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)
    for (key, quantizer), (_, other) in zip(quantizers(model), quantizers(twin), strict=True):
        for name, value in quantizer.state.items():
            torch.testing.assert_close(value, other.state[name], rtol=1e-5, atol=1e-6, msg=f"{key}.{name}")
    fresh = prepared(found)
    assert any(not torch.equal(q.evidence, held(fresh, key).evidence) for key, q in quantizers(model) if q.stateful)


@dataclass(frozen=True)
class Case:
    """A kind, what calibration with X and 2·X leaves of the input, and what tables say of it."""

    found: Range
    calibrated: float
    words: str


CASES = [
    Case(Peak(), 2 * X.abs().max().item(), "amax {:.4g}"),
    Case(Learned(), 4 * X.abs().max().item(), "learned ±{:.3g}"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.found.kind)
class TestTheWay:
    def test_calibrate_explain_export_verify(self, case: Case, tmp_path: Path) -> None:
        model = prepared(case.found)
        fxquant.calibrate(model, [X, 2 * X], progress=False)
        quantizer = held(model)
        assert quantizer.evidence is not None and quantizer.evidence.item() == pytest.approx(case.calibrated)
        assert quantizer.calibrating is None and quantizer.mode(False) is Mode.STATIC
        words = case.words.format(case.calibrated)
        assert words in str(fxquant.explain(model)) and words in repr(quantizer)
        fxquant.export_onnx(model, (X,), tmp_path / "model.onnx")
        assert_codes_agree(fxquant.verify_onnx(model, (X,), tmp_path / "model.onnx"))

    def test_an_error_in_calibration_brings_the_state_back(self, case: Case) -> None:
        model, _ = trained(case.found)
        before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        with pytest.raises(InvalidArgument, match="each batch of data must be"):
            fxquant.calibrate(model, [X * 9, None], progress=False)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    def test_frozen(self, case: Case) -> None:
        model, _ = trained(case.found)
        fxquant.freeze_ranges(model)
        before = held(model).evidence.clone()
        step = torch.compile(model, backend=EAGER)
        step(X * 50).sum().backward()
        assert torch.equal(held(model).evidence, before) and held(model).mode(True) is Mode.STATIC

    def test_saved_and_loaded(self, case: Case) -> None:
        model, _ = trained(case.found)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = prepared(case.found)
        other.load_state_dict(torch.load(file))
        assert torch.equal(held(other).evidence, held(model).evidence) and held(other).resolved
        plan = plan_of(model)
        assert plan is not None and Plan.from_json(plan.to_json()) == plan
        assert {site.local.spec.range for site in plan.sites} == {case.found, CurrentTensor()}
        x = X * 2
        outs = [torch.compile(each.eval(), backend=EAGER)(x) for each in (model, other)]
        assert torch.equal(*outs)
        with pytest.raises(PlanMismatch, match="2 sites differ"):
            fxquant.prepare(Net(), (X,)).load_state_dict(model.state_dict())

    def test_a_float_checkpoint_lacks_it_and_loads(self, case: Case) -> None:
        model = prepared(case.found)
        assert model.load_state_dict(Net().state_dict()) == ([], [])

    def test_overridden(self, case: Case) -> None:
        model, _ = trained(case.found)
        before = held(model).evidence
        moving = QuantSpec(signed=False, symmetric=False)
        mine = QuantSpec(bits=4, signed=False, symmetric=False, range=case.found)
        fxquant.override(model, {"up.input": mine, "down.input": moving})
        assert held(model).evidence is before and held(model).resolved
        assert isinstance(held(model, "down.input").range, MovingAverage) and not held(model, "down.input").resolved
        out = torch.compile(model, backend=EAGER)(X)
        fxquant.override(model, {"down.input": mine})
        assert held(model, "down.input").range == case.found and out.isfinite().all()

    def test_found_in_graphs_by_its_state(self, case: Case) -> None:
        model = prepared(case.found)
        fxquant.calibrate(model, [X], progress=False)
        assert {row.key for row in fxquant.sensitivity(model, [X], progress=False).rows} >= {"up.input", "down.input"}

    def test_not_for_weights(self, case: Case) -> None:
        with pytest.raises(InvalidArgument, match=r"Recipe.weight.range must be CurrentTensor: got (Peak|Learned)\("):
            fxquant.Recipe(name="mine", weight=QuantSpec(range=case.found))
        with pytest.raises(InvalidArgument, match=r"per group must have range=CurrentTensor\(\) or Learned"):
            QuantSpec(axis=0, group_size=8, range=case.found)

    def test_an_unprepared_model_has_no_state(self, case: Case) -> None:
        recipe = fxquant.Recipe(name="mine", activation=QuantSpec(signed=False, symmetric=False, range=case.found))
        net = Net()
        outs = [
            torch.compile(net, backend=EAGER, options={"recipe": chosen})(X)
            for chosen in (recipe, fxquant.Recipe(name="int8"))
        ]
        assert torch.equal(*outs)


# The room


@dataclass(frozen=True, kw_only=True)
class WeightsOnly(Range):
    kind: ClassVar[str] = "test.weights_only"
    roles: ClassVar[frozenset[str]] = frozenset({"weight"})

    def qparams(self, site: SiteGraph, value: fx.Node) -> Qparams:
        raise NotImplementedError


def test_activations_refuse_what_is_for_weights() -> None:
    with pytest.raises(InvalidArgument, match=r"Recipe.activation.range must be one for activations: got WeightsOnly"):
        fxquant.Recipe(name="mine", activation=QuantSpec(range=WeightsOnly()))
    assert fxquant.Recipe(name="mine", weight=QuantSpec(range=WeightsOnly())).weight.range == WeightsOnly()


def test_a_kind_has_a_name_of_its_own() -> None:
    with pytest.raises(InvalidArgument, match=r"Nameless\.kind must be a name of its own: got None"):
        type("Nameless", (Range,), {})
    with pytest.raises(InvalidArgument, match=r"Heir\.kind must be a name of its own"):
        type("Heir", (MovingAverage,), {})
    with pytest.raises(InvalidArgument, match=r"Other\.kind must not be another's: got 'fixed', which is Fixed"):
        type("Other", (Range,), {"kind": "fixed"})
    with pytest.raises(InvalidArgument, match=r"kind of a range must be one of .*'fixed'.* got 'test\.never'. Import"):
        Range.from_dict({"kind": "test.never"})


def test_a_kind_defined_again_takes_its_place() -> None:
    def define() -> Any:
        class Again(WeightsOnly):
            kind: ClassVar[str] = "test.again"

        return Again

    first, second = define(), define()
    assert type(Range.from_dict({"kind": "test.again"})) is second is not first


@pytest.mark.parametrize(
    ("found", "words", "fields", "name"),
    [
        (
            MovingAverage(),
            "MovingAverage(constant=0.01, delayed=False)",
            {"kind": "moving_average", "constant": 0.01, "delayed": False},
            "d65752bed2bf1e66",
        ),
        (
            MovingAverage(constant=0.5, delayed=True),
            "MovingAverage(constant=0.5, delayed=True)",
            {"kind": "moving_average", "constant": 0.5, "delayed": True},
            "661d6ed31eeb5cf0",
        ),
        (CurrentTensor(), "CurrentTensor()", {"kind": "current"}, "c79d528cc981e2c5"),
        (
            Fixed(min=-1, max=6.5),
            "Fixed(min=-1, max=6.5)",
            {"kind": "fixed", "min": -1, "max": 6.5},
            "2fda595c4bb09469",
        ),
    ],
)
def test_names_fields_and_digests_stay(found: Range, words: str, fields: dict[str, Any], name: str) -> None:
    """As version 0.1 wrote them: checkpoints and compile caches go by these."""
    assert str(found) == repr(found) == words and found.to_dict() == fields
    assert list(found.to_dict()) == list(fields) and Range.from_dict(fields) == found
    assert hash(Range.from_dict(fields)) == hash(found)
    edge = Edge(path="", kind="linear", ordinal=0, operand="input")
    site = LocalSite(name="input", role="activation", spec=QuantSpec(signed=False, range=found), edges=(edge,))
    assert digest((site,), "onnxruntime") == name


KINDS = {cls.__name__: cls.kind for cls in (MovingAverage, CurrentTensor, Fixed)}
ROOM = ROOT / "fxquant" / "spec" / "ranges"


def asks_for_a_kind(source: str) -> list[int]:
    """Lines that ask which kind a range is: ``isinstance``, ``type(…) is``, ``….kind == "fixed"``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = node.args[1:]
        elif isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        named = {getattr(part, "id", getattr(part, "attr", "")) for each in asked for part in ast.walk(each)}
        valued = {part.value for part in asked if isinstance(part, ast.Constant)}
        if asked and (named & KINDS.keys() or valued & set(KINDS.values())):
            lines.append(node.lineno)
    return lines


def test_nothing_else_asks_which_kind_a_range_is() -> None:
    files = [*(ROOT / "fxquant").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if ROOM not in path.parents
        for line in asks_for_a_kind(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 100 and not found, "ask the range itself: a method of fxquant.spec.ranges.Range"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("isinstance(r, MovingAverage)", [1]),
        ("isinstance(r, (ranges.Fixed, int))", [1]),
        ("type(r) is CurrentTensor", [1]),
        ("r.kind == 'current'", [1]),
        ("match r:\n    case Fixed(min=0):\n        pass", [2]),
        ("isinstance(r, Range)", []),
        ("range = Fixed(min=0, max=6)", []),
    ],
)
def test_the_search_itself(source: str, lines: list[int]) -> None:
    assert asks_for_a_kind(source) == lines
