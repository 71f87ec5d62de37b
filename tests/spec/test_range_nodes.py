"""The nodes that a range makes of a site, mode by mode, on a graph that only writes down what is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import fx, nn

import fxquant
from fxquant.ops import qparams
from fxquant.prepared.quantizer import quantizers
from fxquant.spec import CurrentTensor, Fixed, Mode, MovingAverage, QuantSpec
from fxquant.spec.ranges import Range

ACTIVATION = QuantSpec(signed=False, symmetric=False)
WEIGHT = QuantSpec(narrow=True, axis=0, range=CurrentTensor())


@dataclass
class Written:
    """A site graph that names each value: ``a = op(…)``, results of a pair with their number."""

    mode: Mode = Mode.STATIC
    role: Literal["weight", "activation", "output"] = "activation"
    format: QuantSpec = ACTIVATION
    axis: int | None = None
    across_ranks: bool = False
    lines: list[str] = field(default_factory=list)
    graph: fx.Graph = field(default_factory=fx.Graph)

    @property
    def state(self) -> Mapping[str, fx.Node]:
        return {name: self._named(name) for name in ("min_val", "max_val")}

    def _named(self, name: str) -> fx.Node:
        known = {node.name: node for node in self.graph.nodes}
        return known[name] if name in known else self.graph.placeholder(name)

    def extremes(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        return self.pair(qparams.BATCH_MIN_MAX, value)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        name = op._schema.name.split("::")[1]
        self.lines.append(f"{name}({', '.join(map(str, args))})")
        return self._named(name)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self._named(f"{node.name}_{index}")

    def pair(self, op: Any, *args: Any) -> tuple[fx.Node, fx.Node]:
        both = self.call(op, *args)
        return self.item(both, 0), self.item(both, 1)

    def constant(self, number: float) -> fx.Node:
        return self._named(f"c{str(number).replace('.', '_').replace('-', 'm')}")

    def store(self, **values: fx.Node) -> None:
        self.lines.append("store(" + ", ".join(f"{name}={value}" for name, value in values.items()) + ")")

    def defer(self, average: fx.Node) -> None:
        self.lines.append(f"defer({average})")


@dataclass(frozen=True)
class Case:
    """A range in a mode, and the calls that it makes, written by hand."""

    name: str
    range: Range
    site: dict[str, Any]
    lines: tuple[str, ...]


def affine(low: str, high: str) -> str:
    return f"affine_qparams({low}, {high}, 0, 255, False)"


UPDATED = "update_min_max(x, min_val, max_val, 0.01)", "store(min_val=update_min_max_0, max_val=update_min_max_1)"
DEFERRED = (
    "batch_min_max(x)",
    "average_min_max(batch_min_max_0, batch_min_max_1, min_val, max_val, 0.01)",
    "defer(average_min_max)",
    "store(min_val=average_min_max_0, max_val=average_min_max_1)",
)
EXTENDED = "extend_min_max(x, min_val, max_val)", "store(min_val=extend_min_max_0, max_val=extend_min_max_1)"
RESOLVED = "resolve_min_max(x, min_val, max_val)", affine("resolve_min_max_0", "resolve_min_max_1")
AVERAGE = MovingAverage()
CASES = [
    Case("stored", AVERAGE, {"mode": Mode.STATIC}, (affine("min_val", "max_val"),)),
    Case("delayed", AVERAGE, {"mode": Mode.DELAYED}, (affine("min_val", "max_val"),)),
    Case("maybe unset", AVERAGE, {"mode": Mode.RESOLVE}, RESOLVED),
    Case("delayed, maybe unset", AVERAGE, {"mode": Mode.FIRST}, RESOLVED),
    Case("training", AVERAGE, {"mode": Mode.TRAIN}, (*UPDATED, affine("update_min_max_0", "update_min_max_1"))),
    Case(
        "training on several ranks",
        AVERAGE,
        {"mode": Mode.TRAIN, "across_ranks": True},
        (*DEFERRED, affine("average_min_max_0", "average_min_max_1")),
    ),
    Case("calibration by extremes", AVERAGE, {"mode": Mode.EXTEND}, EXTENDED),
    Case("calibration by average", AVERAGE, {"mode": Mode.FOLLOW}, UPDATED),
    Case("observing in training", AVERAGE, {"mode": Mode.OBSERVE}, UPDATED),
    Case("observing on several ranks", AVERAGE, {"mode": Mode.OBSERVE, "across_ranks": True}, DEFERRED),
    Case("fixed", Fixed(min=0.0, max=6.0), {}, (affine("c0_0", "c6_0"),)),
    Case(
        "of the tensor",
        CurrentTensor(),
        {},
        ("resolve_min_max(x, cnan, cnan)", affine("resolve_min_max_0", "resolve_min_max_1")),
    ),
    Case(
        "of a weight",
        CurrentTensor(),
        {"role": "weight", "format": WEIGHT, "axis": 0},
        ("symmetric_qparams(x, 0, 127)",),
    ),
    Case(
        "of a token",
        CurrentTensor(),
        {"format": QuantSpec(group_size=-1, range=CurrentTensor()), "axis": 0},
        ("symmetric_qparams(x, 0, 127)",),
    ),
    Case(
        "of a token with a zero point",
        CurrentTensor(),
        {"format": QuantSpec(signed=False, symmetric=False, group_size=-1, range=CurrentTensor()), "axis": 0},
        ("channel_min_max(x, 0)", affine("channel_min_max_0", "channel_min_max_1")),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nodes(case: Case) -> None:
    site = Written(**case.site)
    found = case.range.qparams(site, site._named("x"))
    assert tuple(site.lines) == case.lines
    assert (found is None) == site.mode.calibrates
    if found is not None:
        made_by = case.lines[-1].partition("(")[0]
        assert (str(found.scale), str(found.zero_point)) == (f"{made_by}_0", f"{made_by}_1")
        assert found.scale_gradient == 0.0


def test_an_update_after_use_is_deferred() -> None:
    site = Written(mode=Mode.DELAYED)
    AVERAGE.observe(site, site._named("x"))
    assert tuple(site.lines) == DEFERRED


def test_no_other_kind_updates_after_use() -> None:
    with pytest.raises(NotImplementedError, match="Fixed has no update afterwards"):
        Fixed(min=0.0, max=1.0).observe(Written(), fx.Graph().placeholder("x"))


# (delayed, training, observing, resolved) → the mode of a quantizer that is on and not calibrating
MODES = {
    (False, True, True, False): Mode.TRAIN,
    (False, True, True, True): Mode.TRAIN,
    (False, True, False, False): Mode.RESOLVE,
    (False, True, False, True): Mode.STATIC,
    (False, False, True, False): Mode.RESOLVE,
    (False, False, True, True): Mode.STATIC,
    (True, True, True, False): Mode.FIRST,
    (True, True, True, True): Mode.DELAYED,
    (True, True, False, True): Mode.STATIC,
    (True, False, True, False): Mode.RESOLVE,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(2, 4),))


@pytest.mark.parametrize(("delayed", "training", "observing", "resolved"), MODES)
def test_modes(delayed: bool, training: bool, observing: bool, resolved: bool) -> None:
    found = MovingAverage(delayed=delayed).mode(training and observing, resolved)
    assert found is MODES[delayed, training, observing, resolved]


def test_a_quantizer_that_is_off_or_calibrating_says_so_first(model: nn.Module) -> None:
    sites = dict(quantizers(model))
    activation, weight = sites["0.input"], sites["0.weight"]
    assert activation.mode(True) is Mode.TRAIN and weight.mode(True) is weight.mode(False) is Mode.STATIC
    activation.doing = weight.doing = "observe"
    assert activation.mode(True) is Mode.OBSERVE and {activation.mode(False), weight.mode(True)} == {Mode.OFF}
    activation.observing = False
    assert activation.mode(True) is Mode.OFF
    activation.doing = weight.doing = "float"
    assert {each.mode(training) for each in (activation, weight) for training in (True, False)} == {Mode.OFF}
    activation.calibrating = weight.calibrating = Mode.EXTEND
    assert activation.mode(False) is Mode.EXTEND and weight.mode(False) is Mode.OFF
    activation.enabled = False
    assert activation.mode(False) is Mode.OFF


def test_modes_that_observe_alone_and_those_that_update_afterwards() -> None:
    assert {mode for mode in Mode if mode.calibrates} == {Mode.EXTEND, Mode.FOLLOW, Mode.OBSERVE}
    assert {mode for mode in Mode if mode.updates_afterwards} == {Mode.DELAYED, Mode.FIRST}
