"""What counts as a change of a graph, and that passes are held to what they report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.errors import InvariantViolated
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.changes import Snapshot
from fxquant.passes.stages import JOINT, enter

aten = torch.ops.aten
Change = Callable[[fx.GraphModule], object]


def graph() -> fx.GraphModule:
    """``relu(x + [1, 2] · 3)`` and a part of it."""

    def function(x: Tensor) -> Tensor:
        return torch.relu(x + 2).reshape(3, 2).sum([0, 1])

    return enter(make_fx(function, tracing_mode="fake")(torch.ones(2, 3)), JOINT)


def node(gm: fx.GraphModule, op: Any) -> fx.Node:
    (found,) = (each for each in call_nodes(gm.graph) if each.target is op)
    return found


def append(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(gm.graph.output_node()):
        call(gm.graph, aten.neg.default, node(gm, aten.relu.default), like=node(gm, aten.relu.default))


def prepend(gm: fx.GraphModule) -> None:
    made = gm.graph.find_nodes(op="placeholder")[0]
    with gm.graph.inserting_after(made):
        call(gm.graph, aten.neg.default, made, like=made)


def replace(gm: fx.GraphModule) -> None:
    node(gm, aten.relu.default).replace_all_uses_with(node(gm, aten.add.Tensor))


CHANGES: dict[str, tuple[Change, str]] = {
    "operator": (lambda gm: setattr(node(gm, aten.relu.default), "target", aten.neg.default), "the operator of relu"),
    "operand": (lambda gm: node(gm, aten.add.Tensor).update_arg(1, 3), "the operands of add"),
    "type of a number": (lambda gm: node(gm, aten.add.Tensor).update_arg(1, 2.0), "the operands of add"),
    "list": (lambda gm: node(gm, aten.sum.dim_IntList).update_arg(1, [0]), "the operands of sum_1"),
    "keyword": (
        lambda gm: node(gm, aten.sum.dim_IntList).update_kwarg("keepdim", False),
        "the keyword operands of sum_1",
    ),
    "a reader": (replace, "the operands of"),
    "a node at the end": (append, "the place of output"),
    "a node in front": (prepend, "the place of add"),
    "a value": (
        lambda gm: node(gm, aten.relu.default).meta.update(val=torch.empty(2, 3, device="meta")),
        "the meta['val'] of relu",
    ),
    "a tag": (
        lambda gm: node(gm, aten.relu.default).meta.update(recompute=CheckpointPolicy.MUST_SAVE),
        "the meta['recompute'] of relu",
    ),
}

NO_CHANGES: dict[str, Change] = {
    "nothing": lambda gm: None,
    "the same operand": lambda gm: node(gm, aten.add.Tensor).update_arg(1, 2),
    "the same list": lambda gm: node(gm, aten.sum.dim_IntList).update_arg(1, [0, 1]),
    "a mark of somebody else": lambda gm: node(gm, aten.relu.default).meta.update(somebody=1),
    "code": lambda gm: gm.recompile(),
    "a node that came and went": lambda gm: gm.graph.erase_node(
        gm.graph.call_function(aten.neg.default, (node(gm, aten.relu.default),))
    ),
}


@dataclass(frozen=True, kw_only=True)
class Edit(Pass):
    """Changes what it is told to, and reports what it is told to."""

    stages: ClassVar = (JOINT,)

    change: Change
    reported: int

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        self.change(gm)
        return self.reported


@pytest.mark.parametrize("name", CHANGES)
def test_an_edit_that_is_not_reported(name: str) -> None:
    change, where = CHANGES[name]
    message = f"Edit must report its rewrites: got 0, and it changed {where}"
    with pytest.raises(InvariantViolated, match=f"^{re.escape(message)}"):
        Edit(change=change, reported=0).run(graph())
    assert Edit(change=change, reported=1).run(graph()).modified


@pytest.mark.parametrize("name", NO_CHANGES)
def test_a_report_of_nothing(name: str) -> None:
    with pytest.raises(InvariantViolated, match=r"^Edit must report its rewrites: got 2, and it changed nothing\.$"):
        Edit(change=NO_CHANGES[name], reported=2).run(graph())
    result = Edit(change=NO_CHANGES[name], reported=0).run(graph())
    assert not result.modified and result.rewrites == 0


def nested() -> fx.GraphModule:
    """A graph that holds `graph` as a body."""
    outer = fx.Graph()
    x = outer.placeholder("x")
    body = outer.get_attr("body")
    outer.output(outer.call_function(torch._higher_order_ops.wrap.tag_activation_checkpoint, (body, x)))
    return fx.GraphModule({"body": graph()}, outer)


def test_bodies_count() -> None:
    gm = nested()
    before = Snapshot(gm, ("val",))
    assert before.difference(Snapshot(gm, ("val",))) is None
    body = gm.get_submodule("body")
    assert isinstance(body, fx.GraphModule)
    node(body, aten.add.Tensor).update_arg(1, 5)
    assert before.difference(Snapshot(gm, ("val",))) == "the operands of add"


def test_only_the_keys_that_were_asked_for() -> None:
    gm = graph()
    before = [Snapshot(gm, keys) for keys in ((), ("recompute",))]
    node(gm, aten.relu.default).meta["recompute"] = CheckpointPolicy.MUST_SAVE
    found = [each.difference(Snapshot(gm, keys)) for each, keys in zip(before, ((), ("recompute",)), strict=True)]
    assert found == [None, "the meta['recompute'] of relu"]


def test_dropped_nodes_at_the_end() -> None:
    """All that is left is the same."""
    gm = graph()
    before = Snapshot(gm, ())
    gm.graph.erase_node(gm.graph.output_node())
    assert before.difference(Snapshot(gm, ())) == "6 nodes before, 5 after"


@pytest.mark.parametrize("value", [float("nan"), -0.0, complex(1, 2), "word", None, True])
def test_numbers_are_compared_as_they_are_written(value: Any) -> None:
    gm = graph()
    add = node(gm, aten.add.Tensor)
    add.update_arg(1, value)
    before = Snapshot(gm, ())
    add.update_arg(1, type(value)(value) if value is not None else None)
    assert before.difference(Snapshot(gm, ())) is None
    add.update_arg(1, 0.0)
    assert before.difference(Snapshot(gm, ())) == "the operands of add"
