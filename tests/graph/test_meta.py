"""Marks on nodes are read as they were written, and survive what copies nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from fxquant.graph import meta
from fxquant.graph.edit import copied
from fxquant.passes.captured.insert_fake_quantize import Insertion
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec

aten = torch.ops.aten


def node() -> fx.Node:
    graph = fx.Graph()
    made = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    graph.output(made)
    return made


@dataclass(frozen=True)
class Mark:
    """How a mark is written and read."""

    write: Callable[[fx.Node], None]
    read: Callable[[fx.Node], bool]


MARKS = {
    "observation": Mark(lambda n: meta.mark_observation(n, "world"), meta.is_observation),
    "running statistic": Mark(meta.mark_running_statistic, meta.is_running_statistic),
    "saved as codes": Mark(meta.mark_saved_as_codes, meta.is_saved_as_codes),
    "masked gradient": Mark(meta.mark_masked_gradient, meta.is_masked_gradient),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_is_read_and_no_other(name: str) -> None:
    marked = node()
    assert not any(mark.read(marked) for mark in MARKS.values())
    MARKS[name].write(marked)
    assert [other for other, mark in MARKS.items() if mark.read(marked)] == [name]


@pytest.mark.parametrize("name", MARKS)
def test_marks_are_copied_with_graphs(name: str) -> None:
    marked = node()
    MARKS[name].write(marked)
    copy = copied(fx.GraphModule({}, marked.graph))
    (found,) = copy.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert found is not marked and MARKS[name].read(found)


def test_an_observation_is_taken_once() -> None:
    marked = node()
    meta.mark_observation(marked, "")
    assert meta.take_observation(marked) == ""
    assert not meta.is_observation(marked)


def test_a_running_statistic_leaves_other_custom_keys() -> None:
    marked = node()
    marked.meta["custom"] = shared = {"user": 1}
    meta.mark_running_statistic(marked)
    assert marked.meta["custom"]["user"] == 1
    assert shared == {"user": 1}, "other nodes may hold the same dict"


def test_an_insertion_is_a_site() -> None:
    marked = node()
    assert meta.site_of(marked) is None
    spec = QuantSpec(bits=8)
    marked.meta[meta.SITE] = Insertion(label="fc.weight", role="weight", spec=spec, edges=(), mode=Mode.STATIC)
    site = meta.site_of(marked)
    assert site is not None and (site.label, site.role, site.spec) == ("fc.weight", "weight", spec)
    assert (site.mode, site.state) == (Mode.STATIC, ())


def test_sites_served() -> None:
    marked = node()
    assert meta.sites_served(marked) == ()
    meta.add_stand_in(marked, "a")
    meta.add_stand_in(marked, "b")
    assert meta.sites_served(marked) == ("a", "b")


def test_region_and_source() -> None:
    marked = node()
    (x,) = marked.all_input_nodes
    assert meta.region_of(marked) is None and meta.source_of(x) == ""
    marked.meta[meta.REGION], x.meta[meta.SOURCE] = "checkpoint0", "L['x']"
    assert meta.region_of(marked) == "checkpoint0" and meta.source_of(x) == "L['x']"
    marked.meta[meta.SOURCE] = "L['y']"
    assert meta.source_of(marked) == "", "only inputs come from somewhere"


def test_only_the_keys_that_are_there() -> None:
    marked = node()
    marked.meta.update(region="r", recompute=1, val=2)
    assert meta.copied_meta(marked, "recompute", "region", "ac_graph_id") == {"recompute": 1, "region": "r"}
