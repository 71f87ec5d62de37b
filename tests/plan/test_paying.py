"""The cheapest division of a graph: held to trying all of them, and to what users would expect."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.graph.kinds import kind_of, operands
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.plan.demands import Demands
from fxquant.plan.exceptions import Exceptions
from fxquant.plan.paying import _MARGIN, Prices, examples_in, size_of, slow_as_integers
from fxquant.plan.problem import Problem
from fxquant.plan.solver import place
from fxquant.spec.recipes import INT8
from fxquant.spec.rules import Rule, Rulebook, skip
from fxquant.targets.costs import EDGES, CostTable, Size
from fxquant.targets.profiles import ONNXRUNTIME
from tests.costs import table_of
from tests.passes.graphs import captured

IMAGE = torch.randn(2, 8, 4, 4)
Lines = Mapping[str, float]


class Mixed(nn.Module):
    """Pointwise and depthwise convolutions, one way with a SiLU and one with a ReLU, a residual sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.deep = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.two, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        y = self.two(F.silu(self.deep(x))) + x
        return self.head(torch.flatten(y, 1))


def problem_of(model: Callable[..., Any], *args: Tensor, rules: tuple[Any, ...] = ()) -> Problem:
    gm = captured(model, *args, passes=(FunctionalizeActivations(),))
    exceptions = Exceptions(Rulebook(rules), lambda node: (("", None),), (None, None))
    return Problem(gm.graph, INT8, ONNXRUNTIME, exceptions)


def wanted_by(problem: Problem) -> list[fx.Node]:
    return list(dict.fromkeys(node for node, _ in Demands(problem).activations))


def cost_of(nodes: Mapping[str, bool], times: Mapping[str, tuple[float, float]], lines: Lines) -> float:
    """Of `Mixed`, written out: which layer makes and which read each tensor. True is integers."""
    one, deep, two, add, head = (nodes[name] for name in ("one", "deep", "two", "add", "head"))
    total = sum(times[name][0] if integer else times[name][1] * _MARGIN for name, integer in nodes.items())
    total += lines["enter"] if one else lines["reorder"]  # the picture
    if one:  # read by deep and add
        total += 0 if deep and add else lines["to_float"]
    else:
        total += lines["to_integer"] if deep or add else 0
    total += lines["leave"] if deep else lines["reorder"]  # by SiLU alone
    total += lines["enter"] if two else lines["reorder"]  # SiLU's result
    if two:
        total += 0 if add else lines["to_float"]
    else:
        total += lines["to_integer"] if add else 0
    if add:
        total += 0 if head else lines["to_float"]
    else:
        total += lines["to_integer"] if head else 0
    return total


@pytest.fixture(scope="module")
def mixed() -> tuple[Problem, dict[str, fx.Node]]:
    torch.manual_seed(0)
    problem = problem_of(Mixed(), IMAGE)
    convs = [node for node in problem.graph.nodes if (kind := kind_of(node)) is not None and kind.name == "conv"]
    (add,) = (n for n in problem.graph.nodes if (kind := kind_of(n)) is not None and kind.name == "add")
    (head,) = (n for n in problem.graph.nodes if (kind := kind_of(n)) is not None and kind.name == "linear")
    return problem, dict(zip(("one", "deep", "two", "add", "head"), (*convs, add, head), strict=True))


_TIME = st.integers(1, 40).map(float)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_division_is_cheaper(mixed: tuple[Problem, dict[str, fx.Node]], data: st.DataObject) -> None:
    problem, nodes = mixed
    times = {name: (data.draw(_TIME), data.draw(_TIME)) for name in nodes}
    lines = {name: data.draw(_TIME) for name in EDGES}
    sizes = {name: size_of(node, 2) for name, node in nodes.items()}
    table = table_of({size: times[name] for name, size in sizes.items() if size is not None}, lines)
    wanted = wanted_by(problem)
    slow = slow_as_integers(problem, Prices(table=table, examples=2), wanted, wanted)
    divisions = [dict(zip(nodes, sides, strict=True)) for sides in itertools.product((True, False), repeat=len(nodes))]
    least = min(cost_of(each, times, lines) for each in divisions)
    # The sum is no product: whether it is integers is for the solver to say, so that the better of both counts.
    found = {name: node not in slow for name, node in nodes.items()}
    reached = min(cost_of({**found, "add": side}, times, lines) for side in (True, False))
    assert reached == pytest.approx(least, abs=0.02)  # times are rounded to nanoseconds


def test_sizes_are_those_of_one_example(mixed: tuple[Problem, dict[str, fx.Node]]) -> None:
    _, nodes = mixed
    assert [str(size_of(node, 2)) for node in nodes.values()] == [
        "pointwise 16×8·8×8",
        "depthwise 16×9·9×8",
        "conv 16×72·72×8",
        "add of 128",
        "linear 1×128·128×4",
    ]


def declined(model: nn.Module, table: CostTable, rules: tuple[Any, ...] = ()) -> dict[str, str]:
    problem = problem_of(model, IMAGE, rules=rules)
    found = place(problem.graph, INT8, ONNXRUNTIME, problem.exceptions, Prices(table=table, examples=2))
    return {node.name: why for node, why in found.declined}


POINTWISE = Size(op="pointwise", rows=16, depth=8, columns=8)
DEPTHWISE = Size(op="depthwise", rows=16, depth=9, columns=8)


def block(activation: nn.Module) -> nn.Sequential:
    deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(nn.Conv2d(8, 8, 1), activation, deep, activation, nn.Conv2d(8, 8, 1))


SLOW_DEEP = table_of({POINTWISE: (10.0, 40.0), DEPTHWISE: (30.0, 20.0)}, dict.fromkeys(EDGES, 8.0))


def test_a_slow_layer_between_floats_is_left_and_one_between_integers_stays() -> None:
    between_floats = declined(block(nn.SiLU()), SLOW_DEEP)
    (why,) = between_floats.values()
    assert why == (
        "onnxruntime 1.0, x86_64-vnni takes longer with it on integers, counting the codes around it: by itself 30 µs, "
        "20 in float (depthwise 16×9·9×8, one of 2 examples)"
    )
    assert "conv2d_1" in between_floats
    assert declined(block(nn.ReLU()), SLOW_DEEP) == {}


@pytest.mark.parametrize(
    "rule",
    [
        skip(kind="conv", operand="output"),
        Rule(spec=dataclasses.replace(INT8.weight, bits=4), kind="conv", operand="weight"),
    ],
    ids=["of the result", "of the weight"],
)
def test_a_rule_of_the_users_is_not_overruled(rule: Rule) -> None:
    assert not any("takes longer" in why for why in declined(block(nn.SiLU()), SLOW_DEEP, (rule,)).values())
    recipes_own = dataclasses.replace(rule, optional=True)
    assert any("takes longer" in why for why in declined(block(nn.SiLU()), SLOW_DEEP, (recipes_own,)).values())


def test_kinds_that_the_table_has_not_stay_integers() -> None:
    assert declined(nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)), SLOW_DEEP) == {}


def test_a_sum_that_the_table_has_not_goes_with_its_neighbours() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu(self.one(x)) + x)

    # As integers 2 · 22 + 20 + 20; in float 2 · 1.05 + 3 · 20; with the sum alone on integers 2 more changes.
    found = declined(Residual(), table_of({POINTWISE: (22.0, 1.0)}, dict.fromkeys(EDGES, 20.0)))
    assert [name for name, why in found.items() if "takes longer" in why] == ["conv2d", "conv2d_1"]


def test_products_of_attention_have_a_size() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2)

    problem = problem_of(attend, torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8))
    (product,) = wanted_by(problem)
    assert size_of(product, 2) == Size(op="matmul", rows=15, depth=8, columns=5)
    assert sorted(operands(product)) == ["lhs", "rhs"]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ((torch.zeros(4, 3),), 4),
        ((torch.zeros(4, 3), {"mask": torch.zeros(4)}), 4),
        ((torch.zeros(64, 64), torch.zeros(1, 64, 64)), 1),
        ((torch.zeros(4, 3), torch.tensor(0.5)), 4),
        ((torch.tensor(0.5),), 1),
        ((3, None), 1),
        ((torch.zeros(0, 3),), 1),
    ],
    ids=["one", "a mask too", "a mask of another size", "a scalar beside", "a scalar", "no tensor", "empty"],
)
def test_examples_are_what_all_inputs_agree_on(inputs: Any, expected: int) -> None:
    assert examples_in(inputs) == expected


def test_a_picture_without_a_batch_and_rows_that_are_no_examples_are_not_divided() -> None:
    conv = problem_of(nn.Conv2d(3, 48, 3, padding=1), torch.randn(3, 6, 6))
    assert str(size_of(wanted_by(conv)[0], 3)) == "conv 36×27·27×48"
    flat = problem_of(nn.Linear(4, 4), torch.randn(7, 4))
    assert str(size_of(wanted_by(flat)[0], 2)) == "linear 7×4·4×4"
