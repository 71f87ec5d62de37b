"""Marks of owners in bodies: kept under checkpoints, taken out of the others with the state that they brought."""

from __future__ import annotations

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from fxquant.graph.nodes import is_bind
from fxquant.ops.marks import BIND
from fxquant.passes.captured.silence_bodies import SilenceBodies
from fxquant.passes.stages import CAPTURED, enter
from tests.passes.graphs import apply, untouched

aten = torch.ops.aten


def branch(uses_state: bool, marked: bool) -> fx.GraphModule:
    """``{bind(s); relu(x)}`` or a part of it, of ``(x, s)``."""
    graph = fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("s")
    if marked:
        graph.call_function(BIND, ("key", [0], [state]))
    result = graph.call_function(aten.relu.default, (x,))
    if uses_state:
        result = graph.call_function(aten.add.Tensor, (result, state))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2, device="meta")
    graph.output((result,))
    return fx.GraphModule({}, graph)


def branches(*, uses_state: bool = False, marked: bool = True) -> fx.GraphModule:
    graph = fx.Graph()
    p, x, state = (graph.placeholder(name) for name in ("p", "x", "s"))
    graph.call_function(BIND, ("outer", [0], [state]))
    names = [graph.get_attr(name) for name in ("yes", "no")]
    graph.output(graph.call_function(torch.ops.higher_order.cond, (p, *names, (x, state))))
    held = {"yes": branch(uses_state, marked), "no": branch(False, False)}
    return enter(fx.GraphModule(held, graph), CAPTURED)


def binds(gm: fx.GraphModule) -> int:
    return sum(map(is_bind, gm.graph.nodes))


def bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    found = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "get_attr"]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def test_a_branch_loses_its_mark_and_the_state_that_only_the_mark_reads() -> None:
    gm = branches()
    result = apply(SilenceBodies(), gm)
    assert result.rewrites == 1 and binds(gm) == 1, "the mark around stays"
    assert [binds(body) for body in bodies(gm)] == [0, 0]
    assert [len(body.graph.find_nodes(op="placeholder")) for body in bodies(gm)] == [1, 1]
    (cond,) = (node for node in gm.graph.nodes if node.target is torch.ops.higher_order.cond)
    assert [operand.name for operand in cond.args[3]] == ["x"]
    assert gm(torch.tensor(True), torch.tensor([-1.0, 2.0]), torch.ones(2))[0].tolist() == [0.0, 2.0]


def test_state_that_is_read_otherwise_stays() -> None:
    gm = branches(uses_state=True)
    assert apply(SilenceBodies(), gm).rewrites == 1
    assert [len(body.graph.find_nodes(op="placeholder")) for body in bodies(gm)] == [2, 2]


def test_branches_without_marks() -> None:
    untouched(SilenceBodies(), branches(marked=False))


def checkpointed(body: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("s")
    graph.output(graph.call_function(tag_activation_checkpoint, (graph.get_attr("body"), x, state)))
    return enter(fx.GraphModule({"body": body}, graph), CAPTURED)


def test_a_checkpointed_body_is_traced_into_the_step_and_keeps_its_mark() -> None:
    gm = checkpointed(branch(True, True))
    untouched(SilenceBodies(), gm)
    assert binds(bodies(gm)[0]) == 1


def test_a_checkpoint_inside_a_branch_is_no_better_than_the_branch() -> None:
    outer = branches(marked=False)
    graph = fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("s")
    graph.output(graph.call_function(tag_activation_checkpoint, (graph.get_attr("body"), x, state)))
    outer.yes = fx.GraphModule({"body": branch(True, True)}, graph)
    assert apply(SilenceBodies(), outer).rewrites == 1
    (inner,) = bodies(bodies(outer)[0])
    assert binds(inner) == 0 and binds(outer) == 1
