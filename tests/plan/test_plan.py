from __future__ import annotations

import dataclasses
import json

import pytest

from fxquant.errors import PlanMismatch
from fxquant.plan.plan import Edge, FloatPlace, LocalSite, Plan, Site
from fxquant.plan.site_lists import digest, register, registered, target_of
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import Fixed, MovingAverage
from fxquant.spec.recipes import INT8, W4A8
from tests.processes import under_another_hash_seed

INPUT = LocalSite(
    name="input",
    role="activation",
    spec=INT8.activation,
    edges=(
        Edge(path="", kind="conv", ordinal=0, operand="input"),
        Edge(path="shortcut.0", kind="conv", ordinal=1, operand="input"),
    ),
)
WEIGHT = LocalSite(
    name="weight", role="weight", spec=INT8.weight, edges=(Edge(path="", kind="conv", ordinal=0, operand="weight"),)
)


def plan(*locals_: LocalSite, owner: str = "layer1.0") -> Plan:
    sites = tuple(Site(owner=owner, local=site, reason="operand of conv", source="net.py:3") for site in locals_)
    declined = (FloatPlace(where="add", reason="operands are broadcast", source="net.py:9"),)
    return Plan(recipe="int8", target="onnxruntime", sites=sites, declined=declined)


def test_names() -> None:
    assert [str(edge) for edge in INPUT.edges] == ["conv0.input", "shortcut.0.conv1.input"]
    assert [site.key for site in plan(INPUT, WEIGHT).sites] == ["layer1.0.input", "layer1.0.weight"]
    assert plan(INPUT, owner="").sites[0].key == "input"


def test_round_trips() -> None:
    whole = plan(INPUT, WEIGHT)
    assert Plan.from_json(whole.to_json()) == whole
    assert LocalSite.from_dict(json.loads(json.dumps(INPUT.to_dict()))) == INPUT


def test_another_version_is_refused() -> None:
    fields = {**json.loads(plan(INPUT).to_json()), "version": 0}
    with pytest.raises(PlanMismatch, match=r"checkpoint's plan must be of version 1 to 3: got 0\. Load it with"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("version", [1, 2])
def test_a_plan_from_before_delayed_ranges_is_read(version: int) -> None:
    fields = {**json.loads(plan(INPUT).to_json()), "version": version}
    del fields["sites"][0]["local"]["spec"]["range"]["delayed"]
    assert Plan.from_json(json.dumps(fields)) == plan(INPUT)


def test_owners_keep_the_order() -> None:
    first, second = plan(INPUT, WEIGHT, owner="b"), plan(INPUT, owner="a")
    both = dataclasses.replace(first, sites=(*first.sites, *second.sites))
    assert [(owner, len(sites)) for owner, sites in both.owners().items()] == [("b", 2), ("a", 1)]


def test_difference() -> None:
    mine = plan(INPUT, WEIGHT)
    assert mine.difference(plan(INPUT, WEIGHT)) == []
    assert mine.difference(plan(WEIGHT)) == ["only in the model: layer1.0.input"]
    assert plan(WEIGHT).difference(mine) == ["only in the checkpoint: layer1.0.input"]

    def against(other: LocalSite) -> str:
        (line,) = plan(INPUT, WEIGHT).difference(plan(INPUT, WEIGHT) if other is INPUT else _with(other))
        return line

    def _with(other: LocalSite) -> Plan:
        return plan(*(other if other.name == site.name else site for site in (INPUT, WEIGHT)))

    replace = dataclasses.replace
    assert against(replace(WEIGHT, spec=W4A8.weight)) == (
        "layer1.0.weight: s8 axis 0 in the model, s4 axis 0 in the checkpoint"
    )
    assert against(replace(INPUT, spec=replace(INPUT.spec, range=MovingAverage(constant=0.1)))) == (
        "layer1.0.input: range=MovingAverage(constant=0.01, delayed=False) in the model, "
        "range=MovingAverage(constant=0.1, delayed=False) in the checkpoint"
    )
    assert against(replace(INPUT, spec=replace(INPUT.spec, range=MovingAverage(delayed=True)))) == (
        "layer1.0.input: range=MovingAverage(constant=0.01, delayed=False) in the model, "
        "range=MovingAverage(constant=0.01, delayed=True) in the checkpoint"
    )
    assert against(replace(INPUT, role="output")) == "layer1.0.input: activation in the model, output in the checkpoint"
    assert against(replace(INPUT, edges=INPUT.edges[:1])) == (
        "layer1.0.input: conv0.input, shortcut.0.conv1.input in the model, conv0.input in the checkpoint"
    )


def test_reasons_and_sources_are_no_difference() -> None:
    mine = plan(INPUT)
    moved = tuple(dataclasses.replace(site, source="net.py:77", reason="other words") for site in mine.sites)
    assert mine.difference(dataclasses.replace(mine, sites=moved, declined=())) == []


def test_digest_tells_site_lists_apart() -> None:
    fixed = dataclasses.replace(INPUT, spec=QuantSpec(range=Fixed(min=0, max=6)))
    lists = [(), (INPUT,), (WEIGHT,), (INPUT, WEIGHT), (WEIGHT, INPUT), (fixed,)]
    assert len({digest(sites, target) for sites in lists for target in ("onnxruntime", "openvino")}) == 2 * len(lists)
    key = register((INPUT, WEIGHT), "openvino")
    assert registered(key) == (INPUT, WEIGHT) and target_of(key) == "openvino"


def test_digest_is_the_same_in_every_process() -> None:
    code = "from tests.plan.test_plan import *; print(digest((INPUT, WEIGHT), 'generic'))"
    assert under_another_hash_seed(code).strip() == digest((INPUT, WEIGHT), "generic")


def test_modes_are_numbers_that_graphs_may_hold() -> None:
    assert [int(mode) for mode in Mode] == list(range(9))
