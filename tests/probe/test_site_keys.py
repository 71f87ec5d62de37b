"""The plan's keys of a graph's sites, by what the graph is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.errors import InvalidArgument
from fxquant.graph.meta import SITE, add_stand_in
from fxquant.ops import fake_quantize
from fxquant.passes.captured.insert_fake_quantize import Insertion
from fxquant.prepared.quantizer import quantizers
from fxquant.probe.site_keys import GraphSite, SiteKeys
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from tests.probe.nets import Frames, Pair, random, ready


@pytest.fixture(scope="module")
def frames() -> nn.Module:
    torch.manual_seed(0)
    return ready(Frames(), random(4, 6))


def low(model: nn.Module, key: str) -> Any:
    """The tensor that holds a site's minimum."""
    return dict(quantizers(model))[key].min_val


@dataclass(frozen=True)
class Case:
    name: str
    labels: tuple[str, ...]
    given: Callable[[nn.Module], list[Any]]
    keys: tuple[str, ...]
    state: int | None = None

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("by its state", ("up.input",), lambda m: [7, low(m, "blocks.1.up.input")], ("blocks.1.up.input",), state=1),
    Case("by a parameter", ("down.weight",), lambda m: [m.blocks[1].down.weight], ("blocks.1.down.weight",)),
    Case("by the owner's bias", ("down.weight",), lambda m: [m.blocks[0].down.bias], ("blocks.0.down.weight",)),
    Case("as the whole model calls it", ("blocks.0.up.weight",), lambda m: [], ("blocks.0.up.weight",)),
    Case(
        "the first of a graph with both",
        ("blocks.1.up.weight",),
        lambda m: list(m.parameters()),
        ("blocks.1.up.weight",),
    ),
    Case("not to be told apart", ("down.weight",), lambda m: [], ("down.weight",)),
    Case("no site of the plan", ("elsewhere.weight",), lambda m: list(m.parameters()), ("elsewhere.weight",)),
    Case("half a name is no ending", ("p.weight",), lambda m: list(m.parameters()), ("p.weight",)),
    Case(
        "one that stands for another",
        ("up.input", "down.weight"),
        lambda m: [low(m, "blocks.0.up.input"), m.blocks[0].down.weight],
        ("blocks.0.up.input", "blocks.0.down.weight"),
        state=0,
    ),
    Case(
        "a stateful one that another stands for",
        ("up.weight", "down.input"),
        lambda m: [m.blocks[1].up.weight, low(m, "blocks.1.down.input")],
        ("blocks.1.up.weight", "blocks.1.down.input"),
    ),
    Case(
        "one that stands for itself is named once",
        ("up.weight", "up.weight"),
        lambda m: [m.blocks[1].up.weight],
        ("blocks.1.up.weight",),
    ),
    Case("a state that is nobody's", ("down.input",), lambda m: [torch.zeros(())], ("down.input",), state=0),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys(frames: nn.Module, case: Case) -> None:
    site = GraphSite(labels=case.labels, role="activation", state=case.state)
    assert SiteKeys(frames, "the test").resolve(site, case.given(frames)) == case.keys


def test_one_site_with_a_name_needs_no_evidence() -> None:
    torch.manual_seed(0)
    keys = SiteKeys(ready(nn.Sequential(Pair()), random(4, 6)), "the test")
    assert keys.resolve(GraphSite(labels=("down.weight",), role="weight", state=None), []) == ("0.down.weight",)


def test_of_two_endings_the_shorter_key_is_nearer_to_the_frame() -> None:
    """``body.fc.weight`` and ``fc.weight`` both end in the label of a frame that runs both."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.body = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body["fc"](torch.tanh(self.fc(x)))

    torch.manual_seed(0)
    model = ready(Outer(), random(4, 6))
    keys, given = SiteKeys(model, "the test"), list(model.parameters())
    for label in ("fc.weight", "body.fc.weight"):
        assert keys.resolve(GraphSite(labels=(label,), role="weight", state=None), given) == (label,)


def test_an_unprepared_model_has_no_keys() -> None:
    with pytest.raises(InvalidArgument, match="the test must be given a prepared model: got Pair"):
        SiteKeys(Pair(), "the test")


# ---------------------------------------------------------------- what a node says


def fake_quant(state: tuple[str, ...]) -> tuple[fx.Node, list[fx.Node]]:
    """A fake-quant node, and the placeholders of its graph."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in ("x", "low", "high", "scale", "point")}
    inner = {name: inputs.get(name) or graph.create_node("get_attr", name) for name in state}
    node = graph.call_function(fake_quantize.PER_TENSOR, (inputs["x"], inputs["scale"], inputs["point"], -8, 7))
    node.meta[SITE] = Insertion(
        label="fc.input",
        role="activation",
        spec=QuantSpec(bits=4),
        edges=(),
        mode=Mode.STATIC,
        state=tuple(inner[name] for name in state),
    )
    return node, list(inputs.values())


@pytest.mark.parametrize(
    ("state", "place"),
    [(("low", "high"), 1), ((), None), (("body_low", "body_high"), None)],
    ids=["an input", "no range is kept", "an input of a nested body"],
)
def test_the_state_is_an_input_of_the_graph(state: tuple[str, ...], place: int | None) -> None:
    node, placeholders = fake_quant(state)
    assert GraphSite.of(node, placeholders) == GraphSite(labels=("fc.input",), role="activation", state=place)


def test_a_node_names_those_that_it_stands_for() -> None:
    node, placeholders = fake_quant(())
    add_stand_in(node, "other.input")
    site = GraphSite.of(node, placeholders)
    assert site is not None and site.labels == ("fc.input", "other.input")


def test_a_fake_quant_of_the_user_s_has_no_site() -> None:
    node, placeholders = fake_quant(())
    del node.meta[SITE]
    assert GraphSite.of(node, placeholders) is None
