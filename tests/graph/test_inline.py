from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.graph import inline
from fxquant.graph.inline import KEPT, Bodies, of_operands, paste, traced

aten = torch.ops.aten


def graph_of(function: Callable[..., Any], *inputs: Tensor, mode: str = "fake") -> fx.GraphModule:
    return make_fx(function, tracing_mode=mode)(*inputs)


def node_of(gm: fx.GraphModule, target: Any) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=target)
    return node


def scaled(x: Tensor, y: Tensor, by: float) -> Tensor:
    return (x - y) * by


def fakes(*shapes: tuple[int, ...]) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(shape) for shape in shapes]


def listed(graph: fx.Graph) -> str:
    return "\n".join(f"{node.name} = {node.target}({', '.join(map(str, node.args))})" for node in graph.nodes)


def test_arithmetic_is_traced_under_the_mode_of_its_operands() -> None:
    body = traced(lambda x, y: scaled(x, y, 3.0), fakes((2, 3), (3,)))
    assert_expected_inline(
        listed(body),
        """\
x_1 = x_1()
y_1 = y_1()
sub = aten.sub.Tensor(x_1, y_1)
mul = aten.mul.Tensor(sub, 3.0)
output = output(mul)""",
    )
    assert [tuple(node.meta["val"].shape) for node in body.nodes if node.op == "call_function"] == [(2, 3)] * 2


def test_a_table_says_what_is_traced_instead() -> None:
    body = traced(lambda x: x.round(), fakes((4,)), {aten.round.default: torch.trunc})
    assert [node.target for node in body.nodes if node.op == "call_function"] == [aten.trunc.default]


def test_operands_must_hold_one_that_is_fake() -> None:
    with pytest.raises(AssertionError, match="reads no fake tensor"):
        traced(torch.neg, [torch.ones(2)])


def test_operands_fill_the_places_of_those_that_are_open() -> None:
    def function(*args: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named

    open_places = of_operands(function, ("a", 1, "b"), {"dim": 2}, lambda each: isinstance(each, str))
    assert open_places("x", "y") == (("x", 1, "y"), {"dim": 2})


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of every trace."""
    seen: list[tuple[tuple[int, ...], ...]] = []
    real = inline.traced

    def counted(arithmetic: Any, operands: Any, table: Any = None) -> fx.Graph:
        seen.append(tuple(tuple(each.shape) for each in operands))
        return real(arithmetic, operands, table)

    monkeypatch.setattr(inline, "traced", counted)
    return seen


def test_calls_of_one_form_share_a_body(traces: list[Any]) -> None:
    def model(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return a.exp(), b.exp(), c.exp(), a.to(torch.float64), d.t(), b.sin()

    nodes = [
        node
        for node in graph_of(model, *map(torch.ones, ((2, 3), (2, 3), (2, 4), (3, 2)))).graph.nodes
        if node.op == "call_function"
    ]
    bodies = Bodies()
    found = [bodies.of("neg", torch.neg, [node]) for node in nodes]
    assert found[0] is found[1] is found[5]
    assert len({*found}) == len(traces) == 4, "another size, dtype or order in memory is another form"
    assert bodies.of("abs", torch.abs, nodes[:1]) is not found[0], "so is other arithmetic"
    assert Bodies().of("neg", torch.neg, nodes[:1]) is not found[0], "bodies belong to one graph"


def test_sizes_of_one_symbol_share_a_body(traces: list[Any]) -> None:
    gm = graph_of(lambda x: (x.exp(), x.sin(), x[1:].sin()), torch.ones(5, 3), mode="symbolic")
    nodes = [node for node in gm.graph.nodes if node.target in (aten.exp.default, aten.sin.default)]
    bodies = Bodies()
    first, second, cut = (bodies.of("neg", torch.neg, [node]) for node in nodes)
    assert first is second and cut is not first and len(traces) == 2
    values = [body.find_nodes(op="call_function", target=aten.neg.default)[0].meta["val"] for body in (first, cut)]
    assert [str(value.shape) for value in values] == [str(nodes[0].meta["val"].shape), str(nodes[2].meta["val"].shape)]
    assert all(isinstance(value.shape[0], torch.SymInt) for value in values)


def test_a_body_is_pasted_with_the_tags_of_its_origin() -> None:
    gm = graph_of(lambda x, y: torch.maximum(x, y).exp(), torch.ones(2), torch.zeros(2))
    node, told = node_of(gm, aten.maximum.default), []
    node.meta.update(dict.fromkeys(KEPT, "ours"))
    body = traced(lambda x, y: (y - x).relu(), [each.meta["val"] for each in node.args])
    with gm.graph.inserting_before(node):
        made = paste(gm.graph, body, node.args, origin=node, copied=lambda old, new: told.append((old, new)))
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    assert_expected_inline(
        listed(gm.graph),
        """\
x_1 = x_1()
y_1 = y_1()
sub = aten.sub.Tensor(y_1, x_1)
relu = aten.relu.default(sub)
exp = aten.exp.default(relu)
output = output(exp)""",
    )
    copies = [node_of(gm, target) for target in (aten.sub.Tensor, aten.relu.default)]
    assert [new for _, new in told] == copies and {old.graph for old, _ in told} == {body}
    assert all(each.meta[key] == "ours" for each in copies for key in KEPT)
    assert all("val" in each.meta for each in copies)
    assert not any(key in old.meta and old.meta[key] == "ours" for old, _ in told for key in KEPT), "the body is shared"
    x = torch.tensor([1.0, -3.0])
    gm.recompile()
    assert torch.equal(gm(x, torch.zeros(2)), torch.tensor([1.0, torch.tensor(3.0).exp().item()]))


def test_a_body_of_several_results_gives_all_and_reads_constants() -> None:
    gm = graph_of(lambda x: x.exp(), torch.ones(2))
    (x,) = gm.graph.find_nodes(op="placeholder")
    body = fx.Graph()
    first, second = body.placeholder("first"), body.placeholder("second")
    total = body.call_function(aten.add.Tensor, (first, second))
    body.output((total, (first, None)))
    with gm.graph.inserting_after(x):
        whole, (same, nothing) = paste(gm.graph, body, [x, 2.0])
    assert whole.args == (x, 2.0) and same is x and nothing is None


def test_operands_must_be_as_many_as_the_body_reads() -> None:
    gm = graph_of(lambda x: x.exp(), torch.ones(2))
    with pytest.raises(ValueError, match="shorter"):
        paste(gm.graph, traced(torch.add, fakes((2,), (2,))), gm.graph.find_nodes(op="placeholder"))
