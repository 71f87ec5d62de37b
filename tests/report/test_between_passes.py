"""Graphs between passes: what a step says, how a graph is written, and in which order the passes come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.passes.base import Decline, Pass, PassResult
from fxquant.passes.stages import CAPTURED, EXPORT, Stage
from fxquant.report.between_passes import Step, steps, steps_of
from tests.graph.by_hand import ByHand

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """``exp(x)`` → ``exp2(x)``, of those that are not named; a made-up pass."""

    stages: ClassVar[tuple[Stage, ...]] = (CAPTURED, EXPORT)
    spared: str = ""

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        found = [node for node in gm.graph.nodes if node.target is aten.exp.default]
        for node in found:
            if node.name == self.spared:
                result.declines.append(Decline(pass_name=self.name, node=node.name, reason="it is spared"))
            else:
                node.target = aten.exp2.default
        return sum(node.name != self.spared for node in found)


def two_exponentials() -> fx.GraphModule:
    graph = ByHand()
    x = graph.input("x", 2, 3)
    x.meta["source"] = "L['x']"
    first = graph.call(aten.exp.default, x)
    return graph.module(first, graph.call(aten.exp.default, first))


# ---------------------------------------------------------------- steps


def test_the_graph_comes_first_then_each_pass_with_what_it_changed() -> None:
    passes = [(CAPTURED, Halve(spared="exp_default_1")), (EXPORT, Halve(spared="exp_default_1")), (EXPORT, Halve())]
    captured, once, again, rest = steps_of(two_exponentials(), passes, 3)
    assert [step.name for step in (captured, once, again, rest)] == ["captured", "Halve", "Halve", "Halve"]
    assert [step.stage for step in (captured, once, again, rest)] == ["captured", "captured", "export", "export"]
    assert [step.rewrites for step in (captured, once, again, rest)] == [0, 1, 0, 1]
    assert {step.number for step in (captured, once, again, rest)} == {3}
    assert (once.declines, again.declines, rest.declines) == (("exp_default_1: it is spared",),) * 2 + ((),)
    assert captured.graph is not None and once.graph is not None
    assert captured.graph.count("aten.exp.default(") == 2 and once.graph.count("aten.exp.default(") == 1
    assert again.graph is None, "nothing changed"
    assert rest.graph is not None and "aten.exp.default(" not in rest.graph


@pytest.mark.parametrize(("rewrites", "words"), [(0, "0 rewrites"), (1, "1 rewrite"), (2, "2 rewrites")])
def test_a_heading_counts_in_words(rewrites: int, words: str) -> None:
    step = Step(number=1, stage="joint", name="Fold", rewrites=rewrites, seconds=1.5)
    assert str(step) == f"graph 1, joint: Fold, {words}, 1500.0 ms"


def test_declines_stand_between_the_heading_and_the_graph() -> None:
    step = Step(number=4, stage="export", name="Fold", declines=("a: no", "b: nor this"), graph="  return x")
    assert str(step).splitlines()[1:] == ["  declined a: no", "  declined b: nor this", "  return x"]


def test_a_step_as_plain_values() -> None:
    step = Step(number=1, stage="captured", name="Fold", rewrites=2, declines=("a: no",), seconds=0.5)
    assert json.loads(json.dumps(step.to_dict())) == {
        "number": 1,
        "stage": "captured",
        "name": "Fold",
        "rewrites": 2,
        "declines": ["a: no"],
        "seconds": 0.5,
        "graph": None,
    }


# ---------------------------------------------------------------- graphs as text


def drawn(gm: fx.GraphModule) -> str:
    (captured,) = steps_of(gm, [], 1)
    assert captured.graph is not None
    return captured.graph


def test_a_line_has_name_operator_operands_and_the_value_s_type_and_sizes() -> None:
    graph = ByHand()
    x, index = graph.input("x", 2, 3), graph.input("index", 2, dtype=torch.int64)
    total = graph.call(aten.sum.dim_IntList, x, [1], keepdim=True)
    parts = graph.call(aten.topk.default, x, 1)
    gm = graph.module(total, parts, graph.call(aten.index_select.default, x, 0, index))
    assert_expected_inline(
        drawn(gm),
        """\
  x = placeholder x  float32[2, 3]
  index = placeholder index  int64[2]
  sum_dim_int_list = aten.sum.dim_IntList(x, [1], keepdim=True)  float32[2, 1]
  topk_default = aten.topk.default(x, 1)
  index_select_default = aten.index_select.default(x, 0, index)  float32[2, 3]
  return (sum_dim_int_list, topk_default, index_select_default)""",
    )


def test_a_body_stands_further_in_below_the_operator_that_runs_it() -> None:
    inner = ByHand()
    body = inner.module(inner.call(aten.exp.default, inner.input("a", 2)))
    graph = ByHand()
    x, name = graph.input("x", 2), graph.get_attr("body")
    run = graph.call_function(tag_activation_checkpoint, (name, x))
    assert_expected_inline(
        drawn(graph.module(graph.call_function(aten.neg.default, (run,)), body=body)),
        """\
  x = placeholder x  float32[2]
  body = get_attr body
  tag_activation_checkpoint = tag_activation_checkpoint(body, x)
      a = placeholder a  float32[2]
      exp_default = aten.exp.default(a)  float32[2]
      return (exp_default,)
  neg_default = aten.neg.default(tag_activation_checkpoint)
  return (neg_default,)""",
    )


# ---------------------------------------------------------------- of a model


class Broken(nn.Module):
    """Two layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def test_each_graph_of_a_broken_model_has_all_steps_under_its_number() -> None:
    x = torch.ones(2, 4)
    found = steps(fxquant.prepare(Broken(), (x,)), (x,), until="InsertFakeQuantize")
    names = ["captured", "FunctionalizeActivations", "DecomposeRecurrentCells", "InsertFakeQuantize"]
    numbers = sorted({step.number for step in found})
    assert [(step.number, step.name) for step in found] == [(number, name) for number in numbers for name in names]
    made = {step.number: step.rewrites for step in found if step.name == "InsertFakeQuantize"}
    assert len([number for number, rewrites in made.items() if rewrites]) == 2, made


@pytest.mark.parametrize(
    ("options", "first", "absent"),
    [({}, "FunctionalizeActivations", "Freeze"), ({"export": True}, "FunctionalizeActivations", "SinkWeights")],
    ids=["of a compile", "of an export"],
)
def test_an_unknown_pass_is_answered_with_the_known_ones(options: dict[str, Any], first: str, absent: str) -> None:
    x = torch.ones(2, 4)
    model = fxquant.prepare(nn.Linear(4, 4), (x,))
    with pytest.raises(InvalidArgument) as error:
        steps(model, (x,), until=absent, **options)
    assert str(error.value).startswith(f"until must name a pass: got {absent!r}. They are {first}, ")
    assert f", {absent}" not in str(error.value)


def test_an_unprepared_model() -> None:
    with pytest.raises(InvalidArgument, match=r"passes must be given a prepared model: got Linear without a plan\."):
        steps(nn.Linear(4, 4), (torch.ones(2, 4),))
