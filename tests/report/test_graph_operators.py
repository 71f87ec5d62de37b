"""From graphs written node by node to the operators that people look at: what is shown, as what, read from where."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from fxquant.plan.plan import FloatPlace, Plan
from fxquant.report.graph_operators import graph_operators
from fxquant.report.operators import Operator, Wire, declines_of, label_of
from fxquant.report.sited_graph import SitedGraph
from tests.graph.by_hand import ByHand
from tests.report.plans_by_hand import plan

aten = torch.ops.aten
NOTHING = plan()


def listed(gm: fx.GraphModule, those: Plan = NOTHING, arguments: tuple[str, ...] = ()) -> tuple[Operator, ...]:
    return graph_operators(SitedGraph(gm, those), arguments)


def words(operators: tuple[Operator, ...]) -> list[tuple[str, str]]:
    return [(one.role, one.label) for one in operators]


# ---------------------------------------------------------------- what is shown


def test_inputs_operators_movers_and_the_output_in_their_order() -> None:
    graph = ByHand()
    x, weight = graph.input("x", 2, 3), graph.input("weight", 5, 3, state=True)
    y = graph.call(aten.linear.default, graph.call(aten.view.default, x, [2, 3]), weight)
    assert words(listed(graph.module(graph.call(aten.relu.default, y)))) == [
        ("input", "x"),
        ("mover", "view"),
        ("operator", "linear"),
        ("operator", "relu"),
        ("output", "output"),
    ]


def test_what_is_computed_from_parameters_alone_is_left_out() -> None:
    graph = ByHand()
    x, weight = graph.input("x", 2, 3), graph.input("weight", 3, 5, state=True)
    turned = graph.call(aten.t.default, weight)
    found = listed(graph.module(graph.call(aten.linear.default, x, turned)))
    assert words(found) == [("input", "x"), ("operator", "linear"), ("output", "output")]
    assert found[1].wires == (Wire(operand="input", source=0), Wire(operand="weight", source=None))


def test_an_input_that_nothing_reads_is_left_out() -> None:
    graph = ByHand()
    graph.input("unused", 2)
    x = graph.input("x", 2)
    assert words(listed(graph.module(graph.call(aten.relu.default, x))))[0] == ("input", "x")


def test_an_operator_that_makes_no_tensor_is_left_out() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = 2
    found = listed(graph.module(graph.call(aten.relu.default, x), size))
    assert words(found) == [("input", "x"), ("operator", "relu"), ("output", "output")]


def test_parts_of_one_value_are_the_operator_that_made_them() -> None:
    graph = ByHand()
    x = graph.input("x", 4, 3)
    both = graph.call(aten.chunk.default, x, 2)
    first, second = (graph.call(operator.getitem, both, index) for index in (0, 1))
    found = listed(graph.module(graph.call(aten.add.Tensor, first, second)))
    assert words(found) == [("input", "x"), ("mover", "chunk"), ("operator", "add"), ("output", "output")]
    assert found[2].wires == (Wire(operand="lhs", source=1), Wire(operand="rhs", source=1))


def test_arguments_without_a_quantizer_have_wires_without_a_name() -> None:
    graph = ByHand()
    x, index = graph.input("x", 4, 3), graph.input("index", 2, dtype=torch.int64)
    found = listed(graph.module(graph.call(aten.index_select.default, x, 0, index), x))
    assert found[2].wires == (Wire(operand="", source=0), Wire(operand="", source=1))
    assert found[3].wires == (Wire(operand="", source=2), Wire(operand="", source=0))


def test_an_operator_says_who_runs_it_and_from_which_line() -> None:
    graph = ByHand()
    node = graph.call(aten.relu.default, graph.input("x", 2))
    node.meta["nn_module_stack"] = {"act": ("act", nn.ReLU)}
    node.meta["stack_trace"] = 'File "/src/net.py", line 7, in forward'
    one = listed(graph.module(node))[1]
    assert (one.name, one.module, one.source) == ("relu_default", "act", "/src/net.py:7")
    assert (one.place, one.head, one.kernel, one.declined) == (None, None, "", ())


def test_an_operator_has_what_the_solver_said_of_it_on_its_line() -> None:
    graph = ByHand()
    x = graph.input("x", 2)
    nodes = [graph.call(aten.relu.default, x), graph.call(aten.relu.default, x)]
    for node in nodes:
        node.meta["stack_trace"] = 'File "/src/net.py", line 7, in forward'
    said = [
        ("relu_default", "net.py:9"),
        ("relu_default_1", "/src/net.py:7"),
        ("relu_default_1", "/src/net.py:7"),
    ]
    declined = tuple(
        FloatPlace(where=where, reason=f"reason {number}", source=source) for number, (where, source) in enumerate(said)
    )
    found = listed(graph.module(*nodes), plan(declined=declined))
    assert [one.declined for one in found[1:3]] == [(), ("reason 1", "reason 2")]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("L['x']", "x"),
        ("L['pair'][1]", "pair[1]"),
        ("L['args'][1]", "second"),
        ("L['args'][0].data", "first.data"),
        ("L['args'][2]", "args[2]"),
        ("L['kwargs']['mask']", "mask"),
        ("L['kwargs']['state'][0]", "state[0]"),
        ("G['table']", "primal"),
        ("", "primal"),
    ],
)
def test_an_input_is_called_as_the_user_s_forward_calls_it(source: str, label: str) -> None:
    graph = ByHand()
    x = graph.input("primal", 2)
    x.meta["source"] = source
    (first, *_) = listed(graph.module(graph.call(aten.relu.default, x)), arguments=("first", "second"))
    assert (first.label, first.name) == (label, "primal")


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (aten.conv1d.default, "conv"),
        (aten.mm.default, "matmul"),
        (aten.relu.default, "relu"),
        (aten.addbmm.default, "addbmm"),
        (tag_activation_checkpoint, "tag_activation_checkpoint"),
        (torch.nn.functional.relu, "relu"),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_an_operator_is_called_by_its_kind_or_by_torch_s_name(target: Any, label: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert label_of(graph.call_function(target, (x, x))) == label


def test_reasons_are_kept_by_operator_and_line_in_their_order() -> None:
    said = [("a", "1", "first"), ("b", "1", "second"), ("a", "2", "third"), ("a", "1", "fourth")]
    found = declines_of(FloatPlace(where=where, source=source, reason=reason) for where, source, reason in said)
    assert found == {("a", "1"): ("first", "fourth"), ("b", "1"): ("second",), ("a", "2"): ("third",)}
